"""What all networks of the course have, whatever they compute."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.data import IMAGENET_MEAN, IMAGENET_STD


class Classifier(nn.Module):
    """A network whose `head` ends in the layer that names the classes."""

    head: nn.Sequential

    def get_classifier(self) -> nn.Linear:
        return self.head[-1]

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer, on the device and in the type of the old one."""
        _replace_last(self.head, num_classes)


class SideClassifiers(Classifier):
    """With `aux_heads` too, which end in the same way: Inception's. Its official weights want
    images from -1 to 1, where others want ImageNet's mean and deviation.

    Attributes:
        transform_input: whether `rescale` does something; it may be set later.
    """

    aux_heads: nn.ModuleDict
    transform_input = False

    def reset_classifier(self, num_classes: int) -> None:
        """All heads name the same classes."""
        for head in (self.head, *self.aux_heads.values()):
            _replace_last(head, num_classes)

    def rescale(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), from ImageNet's normalisation to -1 ... 1, if `transform_input`."""
        if not self.transform_input:
            return x
        channels = zip(x.split(1, dim=1), IMAGENET_MEAN, IMAGENET_STD)
        return torch.cat([(c * std + mean - 0.5) / 0.5 for c, mean, std in channels], dim=1)

    def arrange_torchvision_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Auxiliary tensors (aux1, aux2, AuxLogits) last, or left out if we have no such heads."""
        aux = {name: t for name, t in state_dict.items() if name.lower().startswith("aux")}
        rest = {name: t for name, t in state_dict.items() if name not in aux}
        return {**rest, **aux} if self.aux_heads else rest


def _replace_last(head: nn.Sequential, num_classes: int) -> None:
    head[-1] = nn.Linear(head[-1].in_features, num_classes).to(head[-1].weight)
