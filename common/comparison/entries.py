"""Which models a comparison is about, and the form that each takes part in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import nn

from common.comparison.imagenet import published
from common.comparison.sweeps import MOST_WAYS, SHOWN_WAYS, SWEEPS, Entry, MakeEntry
from common.config import TrainConfig
from common.engine.progress import Bar
from common.lessons import get_model
from common.profiling import count_macs, count_parameters


def chosen_names(model: str, default: list[str]) -> list[str]:
    """The models that `--model` names, each once, or the default for "all".

    Raises:
        UserError: one is unknown.
    """
    if model == "all":
        return default
    names = dict.fromkeys(name.strip() for name in model.split(","))
    for name in names:
        get_model(name)
    return list(names)


def without_aux(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """No auxiliary heads: they have a loss of their own, where all others share one, and are idle
    afterwards."""
    return partial(build, aux=False) if "aux" in inspect.signature(build).parameters else build


def small_build(name: str, config: TrainConfig, num_classes: int) -> Callable[..., nn.Module]:
    """The builder told what the dataset asks for."""
    options = {"num_classes": num_classes, "small_input": config.small_input}
    return partial(without_aux(get_model(name)), **options)


def is_small(build: Callable[..., nn.Module]) -> bool:
    """Whether a net's two forms are one: it was made for small images, not for ImageNet."""
    with torch.device("meta"):
        large, small = (build(num_classes=10, small_input=s) for s in (False, True))
    size = (3, 128, 128)
    same_size = count_parameters(large) == count_parameters(small)
    return same_size and count_macs(large, size) == count_macs(small, size)


def imagenet_entries(names: list[str], entry: MakeEntry, bar: Bar) -> list[Entry]:
    """The models that have an ImageNet form, at the size that the published accuracy is for."""
    entries = []
    for name in names:
        build, known = get_model(name), published().get(name)
        if known or not is_small(build):
            side = known.crop if known else 224
            entries.append(entry("ImageNet", name, without_aux(build), side))
            bar.advance(1, name)
        else:
            bar.advance(1 + SWEEPS)  # it won't be measured either
    return entries


def steps(large: Collection[str], small: Collection[str]) -> int:
    """Units of the bar that counting and measuring take."""
    return (1 + SWEEPS) * (len(large) + len(small)) + MOST_WAYS * len({*large} & {*SHOWN_WAYS})
