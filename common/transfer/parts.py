"""A model in parts: those that learn or freeze together, the last layer, both sides of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn


def parts_of(model: nn.Module) -> list[nn.ModuleList]:
    """The model as parts that learn or freeze together, from the stem to the head.

    More than four stages share a part with their neighbours: 18 rates that differ by 2.6 each would
    leave the first at nothing.

    >>> model = nn.Module()
    >>> model.stem, model.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
    >>> model.stages = nn.Sequential(*[nn.Conv2d(8, 8, 3) for _ in range(7)])
    >>> [len(part) for part in parts_of(model)]
    [1, 2, 2, 2, 1, 1]
    """
    stages = [s for s in model.stages.children() if any(True for _ in s.parameters())]
    size = math.ceil(len(stages) / 4)
    parts = [[model.stem], *(stages[i : i + size] for i in range(0, len(stages), size))]
    # What else there is, such as auxiliary heads, learns with the head.
    taken = {id(p) for part in parts for module in part for p in module.parameters()}
    children = [({id(p) for p in child.parameters()}, child) for child in model.children()]
    rest = [child for mine, child in children if mine and not mine & taken]
    parts.append(rest or [model.head])
    return [nn.ModuleList(part) for part in parts]


def classify_with_features(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and what the classifier made them from, the features (N, D)."""
    seen: list[Tensor] = []
    watch = model.get_classifier().register_forward_pre_hook
    with watch(lambda _, inputs: seen.append(inputs[0])):
        logits = model(x)
    return logits, seen[0]


class ClassifierOnFeatures(nn.Module):
    """The last layer alone, to be trained on features (N, D); saved and loaded as the whole
    model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> Tensor:
        return self.model.get_classifier()(features)

    def state_dict(self, *args: object, **options: object) -> dict[str, Tensor]:
        return self.model.state_dict(*args, **options)

    def load_state_dict(self, state: Mapping[str, Tensor], *args: object) -> object:
        return self.model.load_state_dict(state, *args)


class TwoDomains(nn.Module):
    """In training (2N, 3, H, W), source then target -> the source's logits (N, K) and features
    (N, D), the target's logits and features; else logits.

    One domain after the other, so that BatchNorm takes the mean and variance of each.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if not self.training:
            return self.model(x)
        source, target = (classify_with_features(self.model, half) for half in x.chunk(2))
        return *source, *target
