"""ImageNet: the published accuracies, and what it takes to reproduce them on the real images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.data import IMAGENET_MEAN, IMAGENET_STD
from common.engine.errors import UserError
from common.engine.file_loader import from_workers, worker_count
from common.engine.progress import Bar
from common.pretrained import load_torchvision_state, official_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchvision.datasets import ImageFolder

    from common.config import TrainConfig


class Published(NamedTuple):
    """Accuracy on the 50,000 validation images in percent, and how each image is prepared for it.

    An accuracy belongs to a network, its weights and the way the image is cut. These are
    torchvision's first weights (IMAGENET1K_V1), tested on one centre crop.
    """

    top1: float
    top5: float
    crop: int = 224  # side of the centre crop, pixels: the input of the model
    resize: int = 256  # shorter side before the crop
    bicubic: bool = False  # else bilinear


PUBLISHED: dict[str, Published] = {
    "alexnet": Published(56.522, 79.066),
    "vgg11": Published(69.02, 88.628),
    "vgg13": Published(69.928, 89.246),
    "vgg16": Published(71.592, 90.382),
    "vgg19": Published(72.376, 90.876),
    "vgg11_bn": Published(70.37, 89.81),
    "vgg13_bn": Published(71.586, 90.374),
    "vgg16_bn": Published(73.36, 91.516),
    "vgg19_bn": Published(74.218, 91.842),
    "googlenet": Published(69.778, 89.53),
    "inception_v3": Published(77.294, 93.45, crop=299, resize=342),
    "resnet18": Published(69.758, 89.078),
    "resnet34": Published(73.314, 91.42),
    "resnet50": Published(76.13, 92.862),
    "resnet101": Published(77.374, 93.546),
    "resnet152": Published(78.312, 94.046),
    "resnext50_32x4d": Published(77.618, 93.698),
    "resnext101_32x8d": Published(79.312, 94.526),
    "wide_resnet50_2": Published(78.468, 94.086),
    "densenet121": Published(74.434, 91.972),
    "densenet161": Published(77.138, 93.56),
    "densenet169": Published(75.6, 92.806),
    "densenet201": Published(76.896, 93.37),
    "mobilenet_v2": Published(71.878, 90.286),
    "mobilenet_v3_small": Published(67.668, 87.402),
    "mobilenet_v3_large": Published(74.042, 91.34),
    "efficientnet_b0": Published(77.692, 93.532, bicubic=True),
    "efficientnet_b1": Published(78.642, 94.186, crop=240, bicubic=True),
    "efficientnet_b2": Published(80.608, 95.31, crop=288, resize=288, bicubic=True),
    "efficientnet_b3": Published(82.008, 96.054, crop=300, resize=320, bicubic=True),
    "efficientnet_b4": Published(83.384, 96.594, crop=380, resize=384, bicubic=True),
    "efficientnet_b5": Published(83.444, 96.628, crop=456, resize=456, bicubic=True),
    "efficientnet_b6": Published(84.008, 96.916, crop=528, resize=528, bicubic=True),
    "efficientnet_b7": Published(84.122, 96.908, crop=600, resize=600, bicubic=True),
    "vit_b_16": Published(81.072, 95.318),
    "vit_b_32": Published(75.912, 92.466),
    "vit_l_16": Published(79.662, 94.638, resize=242),
}


@torch.inference_mode()
def evaluate_imagenet(model: nn.Module, name: str, config: TrainConfig) -> tuple[float, float, int]:
    """Top-1 and top-5 (fractions) of `name` on the folder `config.eval_imagenet`, and its images.

    Each image is prepared as `PUBLISHED` says. The images are in DIR/CLASS/* or DIR/val/CLASS/*,
    and the class folders in alphabetical order are the model's classes in order, as in the
    validation set sorted into folders named by WordNet ids.

    Raises:
        UserError: no such folder, not the model's classes, or a broken image, which is named.
    """
    from torchvision.transforms import InterpolationMode, v2

    protocol = PUBLISHED[name]
    device = next(model.parameters()).device
    mode = InterpolationMode.BICUBIC if protocol.bicubic else InterpolationMode.BILINEAR
    centre_crop = v2.Compose(
        [
            v2.Resize(protocol.resize, mode, antialias=True),
            v2.CenterCrop(protocol.crop),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    images = class_folders(config.eval_imagenet, model.get_classifier().out_features, centre_crop)
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
                x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
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


def load_official(model: nn.Module, name: str) -> nn.Module:
    """Torchvision's official weights; those of the Inception family want their input in [-1, 1]."""
    if hasattr(model, "transform_input"):
        model.transform_input = True
    return load_torchvision_state(model, official_state(name))
