"""What a model costs: parameters, multiply-adds, milliseconds, megabytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.engine.device import describe, evaluating
from common.engine.measure import fold_batchnorm, peak_memory, time_passes
from common.engine.records import Profile


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters, shared
    ones once. Buffers (BatchNorm's statistics) don't count.
    """
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-adds of one image of `input_size = (C, H, W)` through `model` in eval mode.

    Convolutions, linear layers and attention products count, as in the papers' tables; BatchNorm,
    activations, pooling and biases don't. Works on a model built on the meta device, where it
    computes no numbers at all:

    >>> with torch.device("meta"):
    ...     layer = nn.Conv2d(3, 64, 3, padding=1)
    >>> count_macs(layer, (3, 32, 32)) == 32 * 32 * 64 * 3 * 3 * 3
    True
    """
    return sum(macs_by_module(model, input_size).get("Global", {}).values())


def macs_by_module(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, dict[str, int]]:
    """Multiply-adds of one image by module path,
    then by operator; 'Global' holds the whole model.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here: it brings 80 MB of triton along

    # Attention as two matrix products: the fused kernels of some devices and versions aren't known
    # to the counter.
    plain_attention = sdpa_kernel(SDPBackend.MATH)
    with evaluating(model), torch.no_grad(), plain_attention, FlopCounterMode(display=False) as f:
        model(_dummy_image(model, input_size))
    # FlopCounterMode counts an addition and a multiplication as two operations; the papers as one
    # multiply-add.
    return {
        path: {str(op): flops // 2 for op, flops in ops.items()}
        for path, ops in f.get_flop_counts().items()
    }


def _dummy_image(model: nn.Module, input_size: tuple[int, int, int], batch_size: int = 1) -> Tensor:
    like = next(model.parameters())
    return torch.zeros(batch_size, *input_size, device=like.device, dtype=like.dtype)


def profile(
    model: nn.Module,
    input_size: tuple[int, int, int],
    batch_size: int = 1,
    seconds: float = 1.0,
    fold: bool = False,
) -> Profile:
    """Parameters, MACs, and the latency and peak memory of inference on the device that the model
    is on.

    A few passes warm up caches and algorithm searches; then each pass is timed alone, from a device
    that has nothing else to do to one that is done.

    Args:
        input_size: (C, H, W).
        seconds: limit of the timed part; at least 5 passes and at most 50 are timed.
        fold: time the model as it would be deployed, by `fold_batchnorm`. Parameters and MACs stay
            those of the model itself.
    """
    timed = fold_batchnorm(model) if fold else model
    x = _dummy_image(model, input_size, batch_size).contiguous(memory_format=torch.channels_last)
    median, spread = time_passes(timed, x, seconds=seconds)
    return Profile(
        params=count_parameters(model),
        macs=count_macs(model, input_size),
        latency_ms=median,
        latency_iqr_ms=spread,
        peak_memory_mb=peak_memory(timed, x) / 2**20,
        device=describe(x.device),
        batch_size=batch_size,
        dtype=str(x.dtype).removeprefix("torch."),
    )
