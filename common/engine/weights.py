"""Trained weights as they lie on the disk or the network: the course's own, and torchvision's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.engine import checkpoint
from common.engine.errors import UserError

WEIGHTS = Path(__file__).parents[1] / "weights"


@dataclass
class Bundle:
    """Weights with what it takes to use them."""

    name: str  # the model's, as in its lesson's MODELS
    trained_on: str  # in words
    top1: float  # accuracy on the test images of what it was trained on
    class_names: list[str]  # in the order of its logits
    mean: Tensor  # (3,), of pixels in [0, 1]: what its inputs were normalised with
    std: Tensor  # (3,), likewise
    image_size: int  # side in pixels of its inputs
    state: dict[str, Tensor]  # in float32, whatever it is in the file

    def describe(self) -> str:
        return (
            f"{self.name} of the course, trained on {self.trained_on}: {len(self.class_names)} "
            f"classes at {self.image_size} px, test top-1 {self.top1:.2%}"
        )


def find_bundle(name: str) -> Bundle | None:
    """The course's own weights of a model, or None where it has none.

    Raises:
        UserError: the file is damaged, or is another kind of file.
    """
    path = WEIGHTS / f"{name}.pt"
    if path.parent != WEIGHTS or not path.is_file():
        return None
    try:
        saved = checkpoint.load(path)
    except UserError as error:
        raise UserError(f"{error}: get it anew, for example by git checkout -- {path}") from None
    names = [spec.name for spec in dataclasses.fields(Bundle)]
    if missing := [n for n in names if n not in saved]:
        raise UserError(f"{path} has no {missing[0]}: it was not made by python -m common.bundle")
    state = {n: v.float() if v.is_floating_point() else v for n, v in saved["state"].items()}
    return Bundle(**{**{n: saved[n] for n in names}, "state": state})


def size_for_weights(name: str, image_size: int | None, official: int) -> int:
    """The side in pixels that trained weights are made for: the course's own say it.

    Args:
        image_size: the one that was asked for.
        official: the answer where the course has no weights of its own.

    Raises:
        UserError: --image-size is beyond the 32x32 form, and the course's own weights are of it.
    """
    bundle = find_bundle(name)
    if bundle is None:
        return official
    if image_size is not None and image_size > 64:
        raise UserError(
            f"--pretrained {name} --image-size {image_size}: these weights are for "
            f"{bundle.image_size} px; leave out --image-size"
        )
    return bundle.image_size


def official_state(name: str) -> dict[str, Tensor]:
    """Torchvision's official ImageNet checkpoint of `name`, version 1, from its cache or the
    network.

    Raises:
        UserError: torchvision has none, or it can't be downloaded.
    """
    from torchvision import models

    name = name.removeprefix("torchvision:")  # as lesson 8 spells it
    # Torchvision's own loading knows the older checkpoints' names. The heads that it drops by
    # default are asked for.
    options = {"aux_logits": True} if name in ("googlenet", "inception_v3") else {}
    try:
        weights = models.get_model_weights(name).IMAGENET1K_V1
    except (ValueError, AttributeError):
        raise UserError(
            f"--pretrained {name}: torchvision has no weights for it, nor has common/weights; "
            "leave out --pretrained"
        ) from None
    try:
        return models.get_model(name, weights=weights, **options).state_dict()
    except (OSError, RuntimeError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--pretrained {name}: {weights.url} can't be downloaded ({reason}); put the file "
            f"into {cache}/ by hand"
        ) from None
