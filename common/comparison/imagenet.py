"""ImageNet: the published accuracies, and what it takes to reproduce them on the real images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.engine.errors import UserError
from common.engine.file_loader import from_workers, worker_count
from common.engine.progress import Bar
from common.lessons import Models

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

    from common.comparison.results import Candidate
    from common.config import TrainConfig


class Published(NamedTuple):
    """Accuracy on the 50,000 validation images in percent, and how each image is prepared for it.

    An accuracy belongs to a network, its weights and the way the image is cut.
    """

    top1: float
    top5: float
    crop: int  # side of the centre crop, pixels: the input of the model
    transform: Callable[[Image.Image], Tensor]  # resize, crop, to [0, 1], normalise


@cache
def published() -> dict[str, Published]:
    """Of every model of the course that torchvision has, what torchvision says of its first
    weights (IMAGENET1K_V1), tested on one centre crop.
    """
    from torchvision import models

    known = set(models.list_models())
    return {name: described(name, "IMAGENET1K_V1") for name in Models() if name in known}


def described(name: str, version: str) -> Published:
    from torchvision import models

    weights = models.get_model_weights(name)[version]
    figures, transform = weights.meta["_metrics"]["ImageNet-1K"], weights.transforms()
    return Published(figures["acc@1"], figures["acc@5"], transform.crop_size[0], transform)


NEWER = "(V2) are torchvision's newer weights, trained longer and with more augmentation"


def with_newer_weights(rows: Sequence[Candidate]) -> list[Candidate]:
    """The rows, and after each whose model has newer weights (IMAGENET1K_V2) one for these: the
    same network and cost, another recipe. Not where the newer weights want a larger image.
    """
    from torchvision import models

    version, more = "IMAGENET1K_V2", []
    for row in rows:
        more.append(row)
        if row.model in published() and version in models.get_model_weights(row.model).__members__:
            newer = described(row.model, version)
            if newer.crop == row.input_px:
                top1, top5 = newer.top1 / 100, newer.top5 / 100
                name, source = f"{row.model} (V2)", f"published: torchvision, {version}"
                more.append(replace(row, model=name, top1=top1, top5=top5, source=source))
    return more


@torch.inference_mode()
def evaluate_imagenet(model: nn.Module, name: str, config: TrainConfig) -> tuple[float, float, int]:
    """Top-1 and top-5 (fractions) of `name` on the folder `config.eval_imagenet`, and its images.

    Each image is prepared as `published` says. The images are in DIR/CLASS/* or DIR/val/CLASS/*,
    and the class folders in alphabetical order are the model's classes in order, as in the
    validation set sorted into folders named by WordNet ids.

    Raises:
        UserError: no such folder, not the model's classes, or a broken image, which is named.
    """
    device, transform = next(model.parameters()).device, published()[name].transform
    images = class_folders(config.eval_imagenet, model.get_classifier().out_features, transform)
    loader = DataLoader(
        images,
        config.batch_size,
        num_workers=worker_count(config.workers),
        pin_memory=device.type == "cuda",
    )
    hits = torch.zeros(2, dtype=torch.int64, device=device)  # right at once, right among five
    model.eval()
    try:
        with Bar(len(images), name, "img") as bar:
            for x, y in from_workers(loader):
                x, y = (t.to(device, non_blocking=t.is_pinned()) for t in (x, y))
                # In float32: mixed precision would move the third digit.
                guesses = model(x).topk(min(5, len(images.classes))).indices  # (N, 5)
                right = guesses == y[:, None]
                hits += torch.stack((right[:, 0].sum(), right.sum()))
                bar.advance(len(y))
    except OSError as error:  # from a worker it comes with the worker's whole traceback
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("OSError: ")) from None
    top1, top5 = (hits / len(images)).tolist()
    return top1, top5, len(images)


def class_folders(folder: str, classes: int, transform: Callable[..., Tensor]) -> ImageFolder:
    """The images below DIR/val or DIR, if there is a folder for each class."""
    from torchvision.datasets import ImageFolder

    root = Path(folder) / "val" if (Path(folder) / "val").is_dir() else Path(folder)
    if not root.is_dir():
        raise UserError(f"--eval-imagenet {folder}: no such folder")
    try:
        images = ImageFolder(str(root), transform, loader=read_rgb)
    except FileNotFoundError as error:
        raise UserError(f"--eval-imagenet {root}: {error}") from None
    if len(images.classes) != classes:
        raise UserError(
            f"--eval-imagenet {root}: {len(images.classes)} class folders, and the weights know "
            f"{classes} classes: with a folder missing all labels after it would shift"
        )
    return images


def read_rgb(path: str) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise OSError(f"{path} can't be read as an image: {error}") from None
