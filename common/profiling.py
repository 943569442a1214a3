"""What a model costs: parameters, multiply-adds, milliseconds, megabytes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Iterator


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters, shared ones once. Buffers (BatchNorm's statistics) don't count."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-adds of one image of `input_size = (C, H, W)` through `model` in eval mode.

    Convolutions, linear layers and attention products count, as in the papers' tables; BatchNorm, activations,
    pooling and biases don't. Works on a model built on the meta device, where it computes no numbers at all:

    >>> with torch.device("meta"):
    ...     layer = nn.Conv2d(3, 64, 3, padding=1)
    >>> count_macs(layer, (3, 32, 32)) == 32 * 32 * 64 * 3 * 3 * 3
    True
    """
    return sum(macs_by_module(model, input_size).get("Global", {}).values())


def macs_by_module(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, dict[str, int]]:
    """Multiply-adds of one image by module path, then by operator; 'Global' holds the whole model."""
    with _evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(_dummy_image(model, input_size))
    # FlopCounterMode counts an addition and a multiplication as two operations; the papers as one multiply-add.
    return {
        path: {str(op): flops // 2 for op, flops in ops.items()}
        for path, ops in counter.get_flop_counts().items()
    }


def _dummy_image(model: nn.Module, input_size: tuple[int, int, int], batch_size: int = 1) -> Tensor:
    like = next(model.parameters())
    return torch.zeros(batch_size, *input_size, device=like.device, dtype=like.dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode restored after (a frozen BatchNorm stays frozen)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
