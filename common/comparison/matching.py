"""`--experiment matched-size`: every family as large as the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from common.comparison.entries import small_build
from common.comparison.results import parse_size
from common.comparison.sweeps import Entry, MakeEntry
from common.config import TRAIN_IMAGES
from common.engine.errors import UserError
from common.engine.limits import check_size
from common.engine.progress import Bar
from common.lessons import load_lesson
from common.profiling import count_macs, count_parameters


class Family(NamedTuple):
    """A line of the comparison: where the model is from, and how its builder is told a width."""

    lesson: str
    model: str = ""  # the lesson's default
    # The keywords for a net so many times as wide.
    widened: Callable[[float], dict[str, object]] = lambda width: {"width_mult": width}
    width: float = 1.0  # at which it takes part where sizes aren't matched


def default_model(family: Family) -> str:
    return family.model or load_lesson(family.lesson).Config().model


def matched_width(
    build: Callable[..., nn.Module],
    family: Family,
    size_of: Callable[[nn.Module], int],
    target: float,
) -> float:
    """The width at which the model's size comes closest to `target`, by bisection.

    Widths are whole channels, and MobileNet's and EfficientNet's are multiples of eight: about the
    same size is the best that can be had.
    """
    low, high, tried = 1 / 64, 8.0, {}
    for _ in range(10):  # nine octaves in ten halvings: to 1 %
        width = (low * high) ** 0.5
        with torch.device("meta"):
            size = size_of(build(**family.widened(width)))
        tried[width] = abs(math.log(size / target))
        low, high = (low, width) if size > target else (width, high)
    return min(tried, key=tried.get)


def small_entries(
    names: list[str],
    config: Any,
    num_classes: int,
    bar: Bar,
    families: Sequence[Family],
    entry: MakeEntry,
) -> list[Entry]:
    """What is trained: the families, all equally large if the experiment says so."""
    known = {default_model(family): family for family in families}
    entries, matched = [], config.experiment == "matched-size"
    target = match_target(config, num_classes, families) if matched else 0.0
    for name in names:
        build, family = small_build(name, config, num_classes), known.get(name)
        if matched and not family:
            raise UserError(f"matched-size can scale {', '.join(known)}, not {name}")
        width = family.width if family else 1.0
        if matched:
            width = matched_width(build, family, partial(size_of, config), target)
        if width != 1:
            build = partial(build, **family.widened(width))
        entries.append(entry(config.dataset, name, build, config.image_size))
        if not config.profile_only:
            one = replace(config, model=name)
            check_size(one, lambda *_, net=build: net(), count_macs, TRAIN_IMAGES)
        bar.advance(1, name)
    return entries


def size_of(config: Any, model: nn.Module) -> int:
    """What `--match` makes equal."""
    if config.match == "params":
        return count_parameters(model)
    return count_macs(model, (3, config.image_size, config.image_size))


def match_target(config: Any, num_classes: int, families: Iterable[Family]) -> float:
    """What all are scaled to: by default 0.3M parameters, or the MACs of a ResNet that has them."""
    if config.match_to:
        return parse_size(config.match_to, "--match-to")
    if config.match == "params":
        return 0.3e6
    resnet = next(family for family in families if family.lesson == "01")
    build = small_build(default_model(resnet), config, num_classes)
    width = matched_width(build, resnet, count_parameters, 0.3e6)
    with torch.device("meta"):
        return size_of(config, build(**resnet.widened(width)))
