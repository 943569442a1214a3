"""Where a network's cost is, and which width has a given cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import nn

from common.engine.errors import UserError
from common.engine.measure import time_passes
from common.profiling import count_macs, count_parameters, macs_by_module


def cost_by_kind(
    model: nn.Module, input_size: tuple[int, int, int]
) -> dict[str, tuple[float, float]]:
    """{kind of layer: (its share of the multiply-adds, its share of the parameters)}, of
    convolutions and linear layers.
    """
    macs_of, sums = macs_by_module(model, input_size), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            kind = "x".join(map(str, layer.kernel_size)) + " depthwise" * (layer.groups > 1)
        elif isinstance(layer, nn.Linear):
            kind = "linear"
        else:
            continue
        macs, parameters = sums.get(kind, (0, 0))
        macs += sum(macs_of[f"{type(model).__name__}.{name}"].values())
        sums[kind] = macs, parameters + count_parameters(layer)
    all_macs, all_parameters = (sum(column) for column in zip(*sums.values()))
    return {kind: (m / all_macs, p / all_parameters) for kind, (m, p) in sums.items()}


def width_for_macs(
    build: Callable[..., nn.Module], macs: int, input_size: tuple[int, int, int]
) -> float:
    """The least width_mult, in hundredths from 0.05 to 8, whose net takes at least `macs`
    multiply-adds.

    Raises:
        UserError: even the narrowest takes a third more.
    """

    def cost(hundredths: int) -> int:
        with torch.device("meta"):
            return count_macs(build(width_mult=hundredths / 100), input_size)

    widths = range(5, 800)
    found = widths.start + bisect_left(widths, macs, key=cost)
    if cost(found) > 4 / 3 * macs:
        raise UserError("--trial-width: so narrow that no standard net is as cheap; try 0.15")
    return found / 100


def time_saved(name: str, slow: nn.Module, fast: nn.Module) -> str:
    """Fewer multiply-adds need not save as much time: both, for one image of 224 px on the CPU."""
    size = (3, 224, 224)
    fewer, faster = (cost(slow, size) / cost(fast, size) for cost in (count_macs, milliseconds))
    return f"{name} on 224 px: {fewer:.1f} times fewer multiply-adds, {faster:.1f} times the speed"


def milliseconds(model: nn.Module, input_size: tuple[int, int, int]) -> float:
    """Median time of one image on the CPU; also of a model in integers, which has no parameters."""
    x = torch.randn(1, *input_size).contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    return time_passes(model, x)[0]
