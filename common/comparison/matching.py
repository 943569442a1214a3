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
from common.comparison.sweeps import Entry
from common.config import TRAIN_IMAGES
from common.engine.errors import UserError
from common.engine.limits import check_size
from common.engine.progress import Bar
from common.lessons import load_lesson
from common.profiling import count_macs, count_parameters


class Family(NamedTuple):
    """A line of the comparison: where the model is from, and how its builder is told a width."""

    lesson: str
    model: str  # "": the lesson's default
    widened: Callable[[float], dict[str, object]]  # the keywords for a net so many times as wide
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
    entry: Callable[..., Entry],
) -> list[Entry]:
    """What is trained: the families, all equally large if the experiment says so.

    Args:
        entry: task, name, builder and image size to a line of the table.
    """
    families = {default_model(family): family for family in families}
    entries, matched = [], config.experiment == "matched-size"
    target = match_target(config, num_classes, families.values()) if matched else 0.0
    size_of = count_parameters
    if config.match == "macs":
        size_of = partial(count_macs, input_size=(3, config.image_size, config.image_size))
    for name in names:
        build = small_build(name, config, num_classes)
        if matched and name not in families:
            raise UserError(f"matched-size can scale {', '.join(families)}, not {name}")
        width = families[name].width if name in families else 1.0
        if matched:
            width = matched_width(build, families[name], size_of, target)
        if width != 1:
            build = partial(build, **families[name].widened(width))
        entries.append(entry(config.dataset, name, build, config.image_size))
        if not config.profile_only:
            one = replace(config, model=name)
            check_size(one, lambda _, classes, net=build: net(), count_macs, TRAIN_IMAGES)
        bar.advance(1, name)
    return entries


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
        return count_macs(build(**resnet.widened(width)), (3, config.image_size, config.image_size))
