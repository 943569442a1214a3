"""Which models a comparison is of, in which form and width, what each of them costs; its flags."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from common.comparison.imagenet import published
from common.comparison.results import Candidate, parse_budget, parse_constraints, parse_size, si
from common.comparison.sweeps import MOST_WAYS, SHOWN_WAYS, SWEEPS, Entry, MakeEntry
from common.config import TrainConfig
from common.engine import processes
from common.engine.errors import UserError
from common.engine.progress import Bar
from common.lessons import get_model, lesson_names, load_lesson
from common.limits import check_size, large_enough
from common.profiling import count_macs, count_parameters
from common.runs import prepare


def settled(config: Any) -> tuple[Any, torch.device]:
    """The config with everything filled in, and the device.

    Raises:
        UserError: flags that can't be read or don't go together, before anything is measured.
    """
    parse_constraints(config.choose)
    chosen_names(config.model, [])
    if config.match_to:
        parse_size(config.match_to, "--match-to")
    if (config.match_to or config.match != "params") and config.experiment != "matched-size":
        raise UserError("--match and --match-to are for --experiment matched-size")
    if config.budget and (epochs := parse_budget(config.budget).epochs):
        config = replace(config, epochs=epochs)
    if config.pretrained != bool(config.eval_imagenet):
        raise UserError(
            "--eval-imagenet DIR and --pretrained go together: random weights are right once in "
            "1000, and without the real images there is nothing to show official weights"
        )
    if config.eval_imagenet:
        size = {"image_size": 224, "batch_size": config.batch_size or 32}
        config = replace(config, dataset="imagenet", **size)
    elif config.choose and not config.resume and not config.experiment:
        config = replace(config, profile_only=True)  # the published accuracies answer at once
    config, device = prepare(config)
    if processes.world_size() > 1:
        raise UserError("the comparison runs in one process: start it with python, not torchrun")
    return config, device


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


# ------------------------------------------------------------------- --experiment matched-size


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
            check_size(one, lambda *_, net=build: net())
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


# -------------------------------------------------------- what is known before there are weights


def count_by_thop(model: nn.Module, input_size: tuple[int, int, int], ours: int) -> tuple[int, str]:
    """thop's multiply-adds for one image through a model on the meta device, and where they differ
    from `ours`.

    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> count_by_thop(model, (3, 10, 10), ours=8 * 8 * 8 * 27)
    (15872, '+2.05K BatchNorm2d')
    """
    import thop

    images = torch.zeros(1, *input_size, device="meta")
    total, _, layers = thop.profile(deepcopy(model), (images,), verbose=False, ret_layer_info=True)
    missed, extra = ours, Counter()
    for path, macs in leaves(layers):
        layer = model.get_submodule(path)
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            missed -= macs
        elif macs:
            extra[type(layer).__name__] += macs
    notes = [f"+{si(macs)} {kind}" for kind, macs in extra.most_common()]
    if missed:
        notes.append(f"-{si(missed)} attention products")
    return int(total), ", ".join(notes)


def leaves(layers: dict, path: str = "") -> Iterator[tuple[str, int]]:
    """The layers of thop's nested report, as (path, multiply-adds)."""
    for name, (macs, _, inside) in layers.items():
        here = f"{path}.{name}".lstrip(".")
        if inside:
            yield from leaves(inside, here)
        else:
            yield here, int(macs)


def counted(
    year: Callable[[str], int | None],
    task: str,
    name: str,
    build: Callable[[], nn.Module],
    image_size: int,
) -> Entry:
    """One line of the table, without what has to be measured.

    Args:
        year: of the paper, by the model's name.
        task: what the accuracy is for, "ImageNet" or the dataset.

    Raises:
        UserError: nothing is left of so small an image in this model.
    """
    size = (3, image_size, image_size)
    with torch.device("meta"):
        model = build()
    with large_enough(name, image_size):
        macs = count_macs(model, size)
    by_thop, note = count_by_thop(model, size, macs)
    tensors = [*model.parameters(), *model.buffers()]
    row = published().get(name) if task == "ImageNet" else None
    candidate = Candidate(
        task=task,
        model=name,
        lesson=next(lesson[:2] for lesson in lesson_names() if name in load_lesson(lesson).MODELS),
        year=year(name),
        input_px=image_size,
        params=count_parameters(model),
        macs=macs,
        thop_macs=by_thop,
        thop_note=note,
        size_mb=sum(t.numel() * t.element_size() for t in tensors) / 1e6,
        top1=row and row.top1 / 100,
        top5=row and row.top5 / 100,
        source="published: torchvision, IMAGENET1K_V1" if row else "",
    )
    return Entry(build, candidate)
