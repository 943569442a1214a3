"""The machine under a run: device, precision, memory layout, seeds."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.engine.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU of this process where there is one, else the CPU.

    Raises:
        UserError: the device that was asked for is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"--device {name}: not a device; use auto, cpu, cuda, cuda:1 or mps"
        ) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"--device {name}: torch {torch.__version__} finds no CUDA GPU here; "
                "use --device cpu, or see 'Troubleshooting' in the README"
            )
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "--device mps: this machine has no Metal GPU that torch can use; use --device cpu"
        )
    elif device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: the lessons run on cpu, cuda and mps")
    return device


def describe(device: torch.device) -> str:
    """'NVIDIA H100 80GB HBM3' or 'Intel(R) Xeon(R) Processor, 2 cores'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (name := re.search("model name\\s*: (.+)", info.read_text())):
        cpu = name[1].strip()
    threads = torch.get_num_threads()
    return f"{cpu}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: AMX (Intel from Sapphire Rapids on) or
    AVX512-BF16 (AMD from Zen 4 on, Intel's Cooper Lake).
    """
    info = Path("/proc/cpuinfo")
    return info.exists() and not {"amx_bf16", "avx512_bf16"}.isdisjoint(info.read_text().split())


def amp_dtype(device: torch.device, enabled: bool, image_size: int) -> torch.dtype | None:
    """The reduced precision to train in, or None for float32.

    On CUDA bfloat16 where the chip has it, else float16. On a CPU only with bfloat16 in hardware
    and from 32 px on: without the instructions it is some 13 times slower than float32, and on 8x8
    images with them still 1.3 times slower, since casting the weights then costs more than the
    products save (ResNet-18, two cores with AMX: 104 ms a step in float32 against 139; at 32x32 it
    is 2176 against 845). With AVX512-BF16 alone (AMD EPYC, one thread, batch 128, 32 px) a step in
    float32 takes 1.99 times as long for resnet18, 1.80 for resnet9 and 1.63 for resnet20.
    """
    if not enabled:
        return None
    if device.type == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float16
    if device.type == "cpu" and image_size >= 32 and cpu_has_bfloat16():
        return torch.bfloat16
    return None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Mixed precision inside; with None a no-op, so that no caller has to ask."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode
    restored after (a frozen BatchNorm stays frozen).
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def memory_format(image_size: int, model: nn.Module | None = None) -> torch.memory_format:
    """The layout that a CPU trains fastest in, and a GPU in mixed precision too.

    channels_last, except for images so small that reordering costs more than it saves (at 8 px:
    1.17x). Depthwise convolutions want it at any size: a MobileNet trains 1.5 to 2 times as fast.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)] if model else []
    depthwise = any(1 < m.groups == m.in_channels for m in convolutions)
    return torch.channels_last if image_size >= 32 or depthwise else torch.contiguous_format


def set_up_torch(device: torch.device, seed: int, deterministic: bool = False) -> None:
    """Seeds, TensorFloat-32 where float32 remains,
    and the fastest or the repeatable convolutions.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        # cuBLAS's own condition for repeatability.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory(keep: bool = True) -> bool:
    """Whether glibc keeps large freed blocks for the next step; returns whether it obeyed.

    As it comes it hands a block of 32 MB back to the system, and asks for it again a moment later:
    the system then fills it with zeros, page by page, at every step. Kept, a step of resnet18 on
    two cores takes 0.84 of the time, for as much memory as the largest step once needed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: macOS, Windows, musl
        return False
    # The numbers of malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX.
    settings = {-1: 2**31 - 1, -2: 2**26, -4: 0}
    defaults = {-1: 2**26, -2: 2**17, -3: 2**25, -4: 65536}  # where glibc's own adjustment ends
    return all(mallopt(*setting) == 1 for setting in (settings if keep else defaults).items())


# --------------------------------------------------------------------------------------- randomness


def mixed_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several small numbers, such as (seed, epoch, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Torch's CPU generator at a state that follows from
    `numbers` inside, and where it was before after.
    """
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(mixed_seed(*numbers))
        yield


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a run may draw from, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "mps": torch.mps.get_rng_state() if device.type == "mps" else None,
    }


def restore_rng_state(state: dict[str, Any], device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if device.type == "mps" and state.get("mps") is not None:
        torch.mps.set_rng_state(state["mps"].cpu())
