"""Cells that act while a lesson is stepped through, and are silent and free in a script.

if live():
    show(BasicBlock(3, 16)(digits(8)).shape)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.cli import in_notebook

if TYPE_CHECKING:
    from torch import Tensor


def live() -> bool:
    """Whether someone steps through the lesson: in a notebook, or the window of an editor."""
    return in_notebook()


def digits(count: int = 8, size: int = 8) -> Tensor:
    """Real images to try a block on, (count, 3, size, size) with values from -1 to 1: handwritten
    0, 1, 2, ...
    """
    import torch.nn.functional as F

    from common.engine.sources import load_digits

    pixels = load_digits().train.pixels
    labels = load_digits().train.labels
    rows = [int((labels == i % 10).nonzero()[i // 10]) for i in range(count)]
    x = pixels[rows].float() / 127.5 - 1
    return x if size == 8 else F.interpolate(x, size=(size, size), mode="bilinear")


def show(*things: object, titles: list[str] | None = None) -> None:
    """Images or maps (N, C, H, W) and figures as pictures; anything else as text.

    Of several channels each is a grey picture; three in the range of `digits` are one in colour.
    """
    import torch

    for thing in things:
        if isinstance(thing, torch.Tensor) and thing.dim() == 4:
            thing = _picture(thing.detach(), titles)
        if hasattr(thing, "savefig"):
            from IPython.display import display

            display(thing)
        else:
            print(thing)


def _picture(x: Tensor, titles: list[str] | None) -> object:
    from common import plotting

    x = x.cpu().float()
    if x.shape[1] != 3:
        x = x.flatten(0, 1).unsqueeze(1).repeat(1, 3, 1, 1)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    images = ((x - low) / (high - low).clamp(min=1e-6)).permute(0, 2, 3, 1).numpy()
    return plotting.image_grid(images, titles or [""] * len(images), "")
