"""Official weights in our own models: copied tensor by tensor, in order, or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping


def load_torchvision_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Copy a torchvision checkpoint of the same architecture into `model`, and return it.

    The lessons name their layers to teach, torchvision to stay compatible, so names can't be matched. What
    both share is the order in which a forward pass meets the layers, and both register them in it: the n-th
    tensor of one is the n-th of the other. Every tensor of both sides is used exactly once, and nothing is
    copied unless all of them fit.

    A model whose torchvision twin keeps another order, or carries tensors that ours was built without (the
    auxiliary heads of GoogLeNet and Inception-v3), says so in a method
    `arrange_torchvision_state(state_dict) -> dict`.

    Raises:
        ValueError: names the first pair of tensors that differ in shape or meaning, or the first one left over.
    """
    arrange = getattr(model, "arrange_torchvision_state", dict)
    source, target = arrange(state_dict), model.state_dict()
    # Checkpoints from before torch 0.4.1 (vgg_bn, densenet) have no num_batches_tracked. It counts training
    # steps and takes no part in the output, so it is matched where both have it and left alone otherwise.
    if not any(_role(name) == "num_batches_tracked" for name in source):
        target = {k: v for k, v in target.items() if _role(k) != "num_batches_tracked"}

    for (theirs, value), (ours, slot) in zip(source.items(), target.items()):
        if value.shape != slot.shape or _role(theirs) != _role(ours):
            raise ValueError(
                f"{theirs} {tuple(value.shape)} of the checkpoint does not fit "
                f"{ours} {tuple(slot.shape)} of {type(model).__name__}"
            )
    if len(source) != len(target):
        longer, side = (source, "checkpoint") if len(source) > len(target) else (target, "model")
        left_over = list(longer)[min(len(source), len(target))]
        raise ValueError(
            f"the checkpoint has {len(source)} tensors and {type(model).__name__} {len(target)}: "
            f"{left_over} of the {side} has no partner"
        )
    with torch.no_grad():
        for value, slot in zip(source.values(), target.values()):
            slot.copy_(value)
    return model


def _role(name: str) -> str:
    """'weight', 'bias', 'running_mean', ...: what a tensor is, whatever its layer is called."""
    return name.rpartition(".")[2]
