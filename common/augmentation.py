"""Augmentation of whole batches on the device they train on, each image by its own draw.

Nothing here has a random state. The caller draws `DRAWS` numbers per image and epoch, so that what
happens to an image follows from (seed, epoch, position) alone, whatever the batch size, the device
or the number of processes, and a run that was stopped goes on with the very same pictures.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.engine.device import seeded

DRAWS = 8  # uniform numbers in [0, 1) per image: the columns below
CROP_Y, CROP_X, FLIP, CUTOUT_Y, CUTOUT_X, OPERATION, MAGNITUDE, SIGN = range(DRAWS)
PLACE = [CROP_Y, CROP_X]  # 0.5 in both is the middle, where images are tested


def random_crop(padded: Tensor, index: Tensor, size: tuple[int, int], draws: Tensor) -> Tensor:
    """Cut one window out of each image, at its own place.

    Args:
        padded: (M, C, H + 2p, W + 2p), all images, zero-padded once when they were loaded.
        index: (N,), which images.
        size: (H, W) of a window.
        draws: (N, DRAWS).

    Returns:
        (N, C, H, W). Padding by 4 at 32 px is the CIFAR literature's (He et al. 2015, sec. 4.2).
    """
    height, width = size
    # A view, not a copy: every window of every image, (M, C, 2p+1, 2p+1, H, W).
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    top = (draws[:, CROP_Y] * windows.shape[2]).long()
    left = (draws[:, CROP_X] * windows.shape[3]).long()
    return windows[index, :, top, left]


def random_flip(x: Tensor, draws: Tensor) -> Tensor:
    """Mirror each image left to right, or not, by its own fair coin. (N, C, H, W) -> the same."""
    return torch.where((draws[:, FLIP] < 0.5).view(-1, 1, 1, 1), x.flip(3), x)


def flip_in_turn(rows: Tensor, seed: int, epoch: int) -> Tensor:
    """The FLIP column of draws that mirrors half of the images in even epochs, the other half in
    odd ones.  Jordan 2024, sec. 3.6.

    A fresh coin each time shows half of the images the same way in two epochs; this shows both ways
    of each. rows (N,), which images, a permutation -> (N,), 0 to mirror and 1 to leave.
    """
    coins = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) < 0.5
    return (coins ^ (epoch % 2 == 0))[rows].float()


def pad(pixels: Tensor, edge: int, mirror: bool) -> Tensor:
    """(N, C, H, W) -> (N, C, H + 2 * edge, W + 2 * edge), with zeros or with the mirrored border.

    By numpy, on the CPU: torch's own reflection is for floating-point numbers only.
    """
    widths = (0, 0), (0, 0), (edge, edge), (edge, edge)
    return torch.from_numpy(np.pad(pixels.numpy(), widths, "reflect" if mirror else "constant"))


def cutout(x: Tensor, side: int, draws: Tensor) -> Tensor:
    """Blank one `side` x `side` square per image, centred anywhere.  DeVries and Taylor 2017.

    (N, C, H, W) -> the same.
    """
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device).view(1, -1, 1)
    columns = torch.arange(width, device=x.device).view(1, 1, -1)
    top = (draws[:, CUTOUT_Y] * height).long().view(-1, 1, 1) - side // 2
    left = (draws[:, CUTOUT_X] * width).long().view(-1, 1, 1) - side // 2
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return x.masked_fill(inside.unsqueeze(1), 0)


# TrivialAugment's space: name -> largest magnitude; each image gets one operation at a strength of
# its own. Mueller and Hutter 2021, "wide" space. Shears and colours are relative, translations in
# shares of the image.
OPERATIONS: dict[str, float] = {
    "identity": 0.0,
    "shear_x": 0.99,
    "shear_y": 0.99,
    "translate_x": 1.0,  # of the image's side, as 32 px of a 32 px image
    "translate_y": 1.0,
    "rotate": 135.0,  # degrees
    "brightness": 0.99,
    "color": 0.99,
    "contrast": 0.99,
    "sharpness": 0.99,
    "posterize": 6.0,  # bits dropped, rounded down
    "solarize": 1.0,  # share of the range that is inverted
    "autocontrast": 0.0,
    "equalize": 0.0,
}


def trivial_augment(x: Tensor, draws: Tensor) -> Tensor:
    """One operation of `OPERATIONS` per image, at a random strength and sign.  Mueller and Hutter
    2021, alg. 1.

    Args:
        x: (N, C, H, W) uint8.
        draws: (N, DRAWS) on the CPU: the images are grouped there by operation, so that the device
            never waits.
    """
    kinds = (draws[:, OPERATION] * len(OPERATIONS)).long()
    signs = torch.where(draws[:, SIGN] < 0.5, -1.0, 1.0)
    out = x.clone()
    for kind, (name, largest) in enumerate(OPERATIONS.items()):
        group = (kinds == kind).nonzero().squeeze(1)
        if name == "identity" or len(group) == 0:
            continue
        strength = (draws[group, MAGNITUDE] * largest).to(x.device)
        sign = signs[group].to(x.device)
        group = group.to(x.device)
        out[group] = apply_operation(name, x[group], strength, sign)
    return out


def apply_operation(name: str, x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """`name` of `OPERATIONS` on x (N, C, H, W) uint8; strengths and signs (N,), one an image."""
    signed = strength * sign
    if name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
        return _geometric(name, x, signed)
    if name == "posterize":
        mask = 256 - 2 ** strength.long()  # keeps the upper bits
        return x & mask.to(torch.uint8).view(-1, 1, 1, 1)
    if name == "solarize":
        threshold = 255 * (1 - strength).view(-1, 1, 1, 1)
        return torch.where(x >= threshold, 255 - x, x)
    if name in ("autocontrast", "equalize"):
        from torchvision.transforms.v2 import functional as TF  # here: it takes a second and 170 MB

        return getattr(TF, name)(x)
    return _blend(name, x, 1 + signed)


def _geometric(name: str, x: Tensor, signed: Tensor) -> Tensor:
    """Sample each image on its own sheared, shifted or turned grid; outside it is black."""
    # Output -> input, coordinates in [-1, 1].
    theta = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    if name == "shear_x":
        theta[:, 0, 1] = signed
    elif name == "shear_y":
        theta[:, 1, 0] = signed
    elif name == "translate_x":
        theta[:, 0, 2] = 2 * signed
    elif name == "translate_y":
        theta[:, 1, 2] = 2 * signed
    else:
        angle = torch.deg2rad(signed)
        theta[:, 0, 0] = theta[:, 1, 1] = angle.cos()
        theta[:, 0, 1], theta[:, 1, 0] = angle.sin(), -angle.sin()
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)


def _blend(name: str, x: Tensor, factor: Tensor) -> Tensor:
    """Away from (factor > 1) or towards (< 1) an image that has lost what `name` says."""
    image = x.float()
    if name == "brightness":
        lost = torch.zeros_like(image)
    elif name == "color":
        lost = _grey(image).expand_as(image)
    elif name == "contrast":
        lost = _grey(image).mean(dim=(1, 2, 3), keepdim=True).expand_as(image)
    else:  # sharpness: a soft 3x3 blur that leaves the border alone
        kernel = image.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
        channels = image.shape[1]
        lost = image.clone()
        if min(image.shape[2:]) > 2:
            blurred = F.conv2d(image, kernel.expand(channels, 1, 3, 3), groups=channels)
            lost[:, :, 1:-1, 1:-1] = blurred
    return lost.lerp(image, factor.view(-1, 1, 1, 1)).clamp(0, 255).to(torch.uint8)


def _grey(image: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W), by the weights of ITU-R 601; one channel stays what it is."""
    if image.shape[1] == 1:
        return image
    weights = image.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    return (image * weights).sum(dim=1, keepdim=True)


def per_image(name: str) -> Callable[[Tensor, list[int]], Tensor] | None:
    """torchvision's RandAugment or AutoAugment on small images, one image at a time, each with a
    seed of its own; None for any other name.

    (N, C, H, W) uint8 and N seeds -> (N, C, H, W) uint8.  Cubuk et al. 2019 and 2020. Some 2,000
    images a second on one core; `trivial_augment` works on whole batches and gives as much.
    """
    if name not in ("randaugment", "autoaugment"):
        return None
    from torchvision.transforms import v2

    cifar = v2.AutoAugmentPolicy.CIFAR10
    transform = v2.RandAugment() if name == "randaugment" else v2.AutoAugment(cifar)

    def apply(x: Tensor, seeds: list[int]) -> Tensor:
        out = torch.empty_like(x)
        for i, seed in enumerate(seeds):
            with seeded(seed):
                out[i] = transform(x[i])
        return out

    return apply


class Views(nn.Module):
    """Mean of a model's logits over each image, shifted by a pixel to either side, and the mirror
    images of all three.  Jordan 2024, sec. 3.5.

    (N, C, H, W) -> (N, K), at six times the cost. The image as it is counts half. What it gains is
    no property of the network: name it wherever its accuracy stands beside another.
    """

    def __init__(self, model: nn.Module, flips: bool) -> None:
        super().__init__()
        self.model, self.flips = model, flips

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        height, width = x.shape[2:]
        corners = (padded[:, :, :height, :width], padded[:, :, 2:, 2:])
        logits = 0.0
        for view, weight in ((x, 0.5), *((corner, 0.25) for corner in corners)):
            sides = (view, view.flip(3)) if self.flips else (view,)
            logits = logits + weight * sum(self.model(side) for side in sides) / len(sides)
        return logits
