"""A model as parts that learn or freeze together."""

from __future__ import annotations

import math

from torch import nn


def parts_of(model: nn.Module, most: int = 4) -> list[nn.ModuleList]:
    """The model as parts that learn or freeze together, from the stem to the head.

    Stages beyond `most` share a part with their neighbours: 18 rates that differ by 2.6 each would
    leave the first at nothing.

    >>> model = nn.Module()
    >>> model.stem, model.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
    >>> model.stages = nn.Sequential(*[nn.Conv2d(8, 8, 3) for _ in range(7)])
    >>> [len(part) for part in parts_of(model)]
    [1, 2, 2, 2, 1, 1]
    """
    stages = list(model.stages.children())
    size = math.ceil(len(stages) / most)
    parts = [[model.stem], *(stages[i : i + size] for i in range(0, len(stages), size))]
    # What else there is, such as auxiliary heads, learns with the head.
    taken = {id(p) for part in parts for module in part for p in module.parameters()}
    rest = [
        child
        for child in model.children()
        if any(id(p) not in taken for p in child.parameters())
        and not any(id(p) in taken for p in child.parameters())
    ]
    parts.append(rest or [model.head])
    return [nn.ModuleList(part) for part in parts]
