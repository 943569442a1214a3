"""What can be said of a model before it has any weights: counted twice, ours and thop's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import nn

from common.comparison.imagenet import published
from common.comparison.results import Candidate, si
from common.comparison.sweeps import Entry
from common.engine.limits import too_small
from common.lessons import lesson_names, load_lesson
from common.profiling import count_macs, count_parameters


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
    try:
        macs = count_macs(model, size)
    except (RuntimeError, ValueError) as error:
        raise too_small(name, image_size, error) from None
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
