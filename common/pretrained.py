"""Trained weights in our own models: torchvision's, tensor by tensor, and the course's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.data import IMAGENET_MEAN, IMAGENET_STD
from common.engine import processes
from common.engine.errors import UserError
from common.engine.weights import Bundle, find_bundle, official_state


def load_torchvision_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Copy a torchvision checkpoint of the same architecture into `model`, and return it.

    The lessons name their layers to teach, torchvision to stay compatible, so names can't be
    matched. What both share is the order in which a forward pass meets the layers, and both
    register them in it: the n-th tensor of one is the n-th of the other. Every tensor of both sides
    is used exactly once, and nothing is copied unless all of them fit.

    A model whose torchvision twin keeps another order, or carries tensors that ours was built
    without (the auxiliary heads of GoogLeNet and Inception-v3), says so in a method
    `arrange_torchvision_state(state_dict) -> dict`.

    Raises:
        ValueError: names the first pair of tensors that differ in shape or meaning, or the first
            one left over.
    """
    arrange = getattr(model, "arrange_torchvision_state", dict)
    source, target = arrange(state_dict), model.state_dict()
    # Checkpoints from before torch 0.4.1 (vgg_bn, densenet) have no num_batches_tracked. It counts
    # training steps and takes no part in the output, so it is matched where both have it and left
    # alone otherwise.
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


# -------------------------------------------------------------------------- where weights come from


def weights_mean_std(name: str) -> tuple[Tensor, Tensor]:
    """(3,) each: what trained weights of `name` want their inputs normalised with."""
    bundle = find_bundle(name)
    if bundle is not None:
        return bundle.mean, bundle.std
    return torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)


def load_pretrained(model: nn.Module, name: str, class_names: list[str] | None = None) -> nn.Module:
    """Put trained weights into `model`, whose classifier may have any number of classes.

    The course's own weights where it has some for `name`, which needs no network; else
    torchvision's official ones, downloaded once. Official weights bring their classifier where it
    is of the same size. The course's bring theirs only for `class_names` equal to those that it was
    trained on, in the same order: ten digits are not ten animals. Otherwise the classifier is new.

    Raises:
        UserError: there are no weights for `name`, they can't be downloaded, are damaged, or don't
            fit the model.
    """
    bundle = find_bundle(name)
    state = bundle.state if bundle else official_state(name)
    ours = model.get_classifier().out_features
    # Torchvision's last tensor is the classifier's bias.
    theirs = len(bundle.class_names) if bundle else len(next(reversed(state.values())))
    if theirs != ours:
        model.reset_classifier(theirs)
    if bundle:
        same = class_names == bundle.class_names
        classifier = "kept: the classes are the same" if same else "new"
        copy_bundle(model, bundle, f"; its classifier is {classifier}")
    else:
        same = theirs == ours
        try:
            load_torchvision_state(model, state)
        except ValueError as error:
            raise UserError(
                f"--pretrained {name}: the weights don't fit this form of the model ({error}); "
                "official weights are for images of 96 px and more"
            ) from None
        if hasattr(model, "transform_input"):
            model.transform_input = True  # their inputs are scaled to [-1, 1]
    if not same:
        model.reset_classifier(ours)
    return model


def copy_bundle(model: nn.Module, bundle: Bundle, more: str = "") -> None:
    """Put the course's own weights into a model of as many classes as they know, and say so.

    Raises:
        UserError: they are of another form of the model.
    """
    shapes, slots = (
        {(name, value.shape) for name, value in state.items()}
        for state in (bundle.state, model.state_dict())
    )
    if odd := shapes ^ slots:
        raise UserError(
            f"--pretrained {bundle.name}: the weights don't fit this form of the model "
            f"({min(name for name, _ in odd)} differs); they are for the one that its lesson "
            f"builds by default for {bundle.image_size} px"
        )
    model.load_state_dict(bundle.state)
    if processes.is_main():
        print(f"weights    {bundle.describe()}{more}", flush=True)
