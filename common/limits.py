"""What a machine can't do is refused before it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from common.config import TRAIN_IMAGES, TrainConfig
from common.engine.errors import UserError
from common.engine.sources import size_of_folder
from common.profiling import count_macs, count_parameters

DAYS = 30  # more than that on hardware at its very best is a slip of the keyboard


def check_size(config: TrainConfig, build: Callable[[Any, int], nn.Module]) -> None:
    """Refuse, before anything starts, what needs more memory or time than this machine has.

    Counted on the meta device, where a net of any size costs nothing. What is counted is the least
    that a training can do with; so what passes may still be too much.

    Raises:
        UserError: too large, or too small an image for this model.
    """
    name = "digits" if config.dataset == "auto" else config.dataset
    unsized = name == "folder" and config.image_size is None
    config = config.resolve(name, size_of_folder(config.data_dir)[0] if unsized else None)
    size = (3, config.image_size, config.image_size)
    images = TRAIN_IMAGES.get(name, 1000)  # of a folder nothing is known yet
    outputs: list[int] = []
    with large_enough(config.model, config.image_size):
        with torch.device("meta"):
            model = build(config, 10)
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda m, x, y: outputs.append(_numbers(y)))
        macs = count_macs(model, size)
    # Weights, gradients, momentum, and what backward needs of one batch: not every layer's output
    # (a norm's goes as soon as the ReLU after it is done), hence the half.
    batch = min(config.batch_size, images)
    parameters = count_parameters(model) * (4 if config.ema else 3)
    needed = 4 * (parameters + batch * sum(outputs) // 2)
    there = memory(config.device)
    gib = 2**30
    if needed > there:
        advice = "a smaller --batch-size with --accumulate, or a smaller --image-size"
        if 4 * parameters > there:
            advice = "a smaller model"
        raise UserError(
            f"{config.model} at {config.image_size} px with {batch} images a batch needs about "
            f"{needed / gib:,.0f} GiB of memory, and there are {there / gib:,.0f}: try {advice}"
        )
    # A forward pass and a backward of twice its cost, at the peak of a core or of a large GPU.
    peak = 1e15 if torch.cuda.is_available() and config.device != "cpu" else 1e11 * os.cpu_count()
    days = 3 * macs * images * config.epochs / peak / 86_400
    if days > DAYS and not config.smoke:
        raise UserError(
            f"{config.model} at {config.image_size} px would take {days:,.0f} days here, at the "
            f"very least, for {config.epochs} epochs: try fewer --epochs, a smaller --image-size "
            "or a smaller model"
        )


@contextmanager
def large_enough(model: str, image_size: int) -> Iterator[None]:
    """Inside, `model` is run on an image of so many pixels.

    Raises:
        UserError: its layers make nothing of so small a one.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "must match" not in str(error) and "size" not in str(error):
            raise
        raise UserError(
            f"--image-size {image_size}: {model} makes nothing of so small an image "
            f"({str(error).splitlines()[0][:80]})"
        ) from None


def memory(device: str) -> int:
    """Bytes of memory of the GPU that a run would take, or of this machine (or its container)."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    there = 2**63
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        there = min(there, int(text))
    return there


def _numbers(output: object) -> int:
    return sum(t.numel() for t in tree_leaves(output) if isinstance(t, Tensor))
