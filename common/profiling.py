"""What a model costs: parameters, multiply-adds, milliseconds, megabytes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.engine.device import describe, evaluating
from common.engine.fold import fold_batchnorm
from common.engine.measure import peak_memory, time_passes
from common.engine.records import LayerRecord, Profile


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
    from torch.utils.flop_counter import (
        FlopCounterMode,
    )  # here: it brings triton along, 80 MB of it

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


def layer_table(
    model: nn.Module, input_size: tuple[int, int, int], depth: int = 0
) -> list[LayerRecord]:
    """One record per layer that computes or holds something, in the order of the definition.

    Output shapes are of one image; parameters and MACs are a layer's own, so that the columns add
    up to `count_parameters` and `count_macs`. Works on the meta device.

    Args:
        depth: what lies deeper is counted with the module of so many levels around it; 0: nothing.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape)

        return hook

    hooks = [m.register_forward_hook(note(name)) for name, m in model.named_modules()]
    try:
        macs = macs_by_module(model, input_size)
    finally:
        for hook in hooks:
            hook.remove()
    root = type(model).__name__
    total = {path.removeprefix(root + "."): sum(ops.values()) for path, ops in macs.items()}
    total[""] = total.pop("Global", 0)
    modules = dict(model.named_modules())
    for name in sorted(modules, key=lambda n: -n.count(".")):
        # A list of modules is never called itself, so the counter knows nothing of it.
        if name not in total and list(modules[name].children()):
            inside = (f"{name}.{child}" for child, _ in modules[name].named_children())
            total[name] = sum(total.get(child, 0) for child in inside)
    records, seen = [], set()
    for name, module in modules.items():
        if depth and name.count(".") >= depth:
            continue
        # A parameter that two layers share is listed, as it is counted, with the first.
        folded = bool(depth) and name.count(".") == depth - 1 and name != ""
        own_parameters = [p for p in module.parameters(recurse=folded) if p not in seen]
        seen.update(own_parameters)
        children = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        children = [] if folded else children
        own_macs = total.get(name, 0) - sum(total.get(child, 0) for child in children)
        params = sum(p.numel() for p in own_parameters)
        # What holds parameters is listed even if it runs in training only (auxiliary heads).
        if params or own_macs or (name in shapes and not children):
            kind, shape = type(module).__name__, shapes.get(name, ())
            records.append(
                LayerRecord(name or root, kind, shape, params, own_macs, name.count("."))
            )
    return records


def thop_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """What thop counts for the same image: BatchNorm
    and pooling too, attention and bare parameters not.
    """
    import thop

    copy = deepcopy(model).to("meta").eval()  # thop leaves its counters in the modules
    with torch.no_grad():
        image = torch.zeros(1, *input_size, device="meta")
        macs, _ = thop.profile(copy, (image,), verbose=False)
    return int(macs)


def profile(
    model: nn.Module,
    input_size: tuple[int, int, int],
    batch_size: int = 1,
    amp: torch.dtype | None = None,
    channels_last: bool = True,
    seconds: float = 1.0,
    repeats: int = 50,
    fold: bool = False,
) -> Profile:
    """Parameters, MACs, and the latency and peak memory of inference on the device that the model
    is on.

    A few passes warm up caches and algorithm searches; then each pass is timed alone, from a device
    that has nothing else to do to one that is done.

    Args:
        input_size: (C, H, W).
        amp: reduced precision, or None for the model's own.
        seconds: limit of the timed part; at least 5 passes and at most `repeats` are timed.
        fold: time the model as it would be deployed, by `fold_batchnorm`. Parameters and MACs stay
            those of the model itself.
    """
    timed = fold_batchnorm(model) if fold else model
    x = _dummy_image(model, input_size, batch_size)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    low, median, high = np.percentile(time_passes(timed, x, amp, seconds, repeats), (25, 50, 75))
    return Profile(
        params=count_parameters(model),
        macs=count_macs(model, input_size),
        latency_ms=float(median),
        latency_iqr_ms=float(high - low),
        peak_memory_mb=peak_memory(timed, x, amp) / 2**20,
        device=describe(x.device),
        batch_size=batch_size,
        dtype=str(amp or x.dtype).removeprefix("torch."),
        input_size=tuple(input_size),
    )
