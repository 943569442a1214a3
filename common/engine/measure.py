"""A forward pass as it is deployed, without the BatchNorms that a convolution can swallow; its
milliseconds and bytes.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.engine.device import autocast, evaluating


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
        folded = fuse(exact, inplace=True)
        off = ((folded(x) - expected).abs().max() / expected.abs().max()).item()
    if not off < 1e-6:
        raise ValueError(
            f"{type(model).__name__} without its BatchNorms gives logits that are {off:.1e} of the "
            "largest away from its own"
        )
    folded.delete_all_unused_submodules()
    like = next(model.parameters())
    return folded.to(like.device, like.dtype).eval()


@torch.inference_mode()
def time_passes(
    model: nn.Module, x: Tensor, amp: torch.dtype | None = None, seconds: float = 1.0
) -> tuple[float, float]:
    """Milliseconds of a pass of the batch `x`: median and interquartile range of several, see
    `profile`.
    """
    times: list[float] = []
    with evaluating(model), autocast(x.device, amp):
        for _ in range(3):
            model(x)
        began = time.perf_counter()
        while len(times) < 5 or (len(times) < 50 and time.perf_counter() - began < seconds):
            _synchronize(x.device)
            start = time.perf_counter()
            model(x)
            _synchronize(x.device)
            times.append(1000 * (time.perf_counter() - start))
    low, median, high = np.percentile(times, (25, 50, 75))
    return float(median), float(high - low)


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
        held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers(), x))
        if x.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(x.device)
            # The images of a data set, momentum and averages are there too, and are not inference.
            before = torch.cuda.memory_allocated(x.device)
            model(x)
            return held + torch.cuda.max_memory_allocated(x.device) - before
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
