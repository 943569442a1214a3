"""What a model costs: parameters, multiply-adds, milliseconds, megabytes."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.engine.device import autocast, describe, evaluating
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


def layer_table(model: nn.Module, input_size: tuple[int, int, int]) -> list[LayerRecord]:
    """One record per layer that computes or holds something, in the order of the definition.

    Output shapes are of one image; parameters and MACs are a layer's own, so that the columns add
    up to `count_parameters` and `count_macs`. Works on the meta device.
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
    records, seen = [], set()
    for name, module in model.named_modules():
        # A parameter that two layers share is listed, as it is counted, with the first.
        own_parameters = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own_parameters)
        children = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
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


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference, without the BatchNorms that follow a convolution.

    In eval mode y = (W x - mean) / std * gamma + beta is itself a convolution, of weights
    gamma / std * W and bias beta - gamma / std * mean, so the norm costs nothing. A norm in front
    of a convolution, with a ReLU in between (pre-activation ResNets, DenseNet), has to stay.

    The equality is checked each time, in float64, where nothing but a wrong fold can tell the two
    apart: the rounding of float32 alone moves the logits of a deep net with random weights by
    several percent.

    Raises:
        ValueError: the logits of an image of noise are not the same.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> [type(layer).__name__ for layer in fold_batchnorm(model).children()]
    ['Conv2d', 'ReLU']
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return deepcopy(model).eval()
    from torch.fx.experimental.optimization import fuse

    exact = deepcopy(model).to("cpu", torch.float64).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
        expected = exact(x)
        off = ((fuse(exact)(x) - expected).abs().max() / expected.abs().max()).item()
    if not off < 1e-6:
        raise ValueError(
            f"{type(model).__name__} without its BatchNorms gives logits that are {off:.1e} of the "
            "largest away from its own"
        )
    with evaluating(model):
        folded = fuse(model)
    folded.delete_all_unused_submodules()
    return folded.eval()


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


@torch.inference_mode()
def time_passes(
    model: nn.Module,
    x: Tensor,
    amp: torch.dtype | None = None,
    seconds: float = 1.0,
    repeats: int = 50,
) -> list[float]:
    """Milliseconds of each of several passes of the batch `x`, see `profile`."""
    times: list[float] = []
    with evaluating(model), autocast(x.device, amp):
        for _ in range(3):
            model(x)
        began = time.perf_counter()
        while len(times) < 5 or (len(times) < repeats and time.perf_counter() - began < seconds):
            _synchronize(x.device)
            start = time.perf_counter()
            model(x)
            _synchronize(x.device)
            times.append(1000 * (time.perf_counter() - start))
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@torch.inference_mode()
def peak_memory(model: nn.Module, x: Tensor, amp: torch.dtype | None = None) -> int:
    """Bytes in tensors at the worst moment of one pass, weights included.

    On CUDA the allocator knows. Elsewhere every new tensor is followed from birth to death, which
    leaves out what a kernel takes for itself.
    """
    with evaluating(model), autocast(x.device, amp):
        if x.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(x.device)
            model(x)
            return torch.cuda.max_memory_allocated(x.device)
        held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers(), x))
        with _LiveBytes() as live:
            model(x)
        return held + live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside the block
    that are still alive, and the most there ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        before = {a.untyped_storage()._cdata for a in tree_leaves(args) if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
