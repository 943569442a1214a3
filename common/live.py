"""Cells that act while a lesson is stepped through, and are silent and free in a script.

if live():
    show(BasicBlock(3, 16)(digits(8)).shape)
"""

from __future__ import annotations

import ast
import inspect
import io
import linecache
import sys
from typing import TYPE_CHECKING

from common.cli import in_notebook

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def live() -> bool:
    """Whether someone steps through the lesson that asks: in a notebook, or the window of an
    editor. Not where another lesson imports it.
    """
    return in_notebook() and sys._getframe(1).f_globals["__name__"] == "__main__"


def digits(count: int = 8, size: int = 8) -> Tensor:
    """Real images to try a block on, (count, 3, size, size) with values from -1 to 1: handwritten
    0, 1, 2, ...
    """
    import torch.nn.functional as F

    from common.engine.sources import load_digits

    train = load_digits().train
    rows = [int((train.labels == i % 10).nonzero()[i // 10]) for i in range(count)]
    x = train.pixels[rows].float() / 127.5 - 1
    return x if size == 8 else F.interpolate(x, size=(size, size), mode="bilinear")


def show(*things: object, titles: list[str] | None = None) -> None:
    """Images or maps (N, C, H, W) and figures as pictures, a class or function as its source,
    anything else as text.

    Of several channels each is a grey picture; three in the range of `digits` are one in colour.
    """
    import torch

    for thing in things:
        if isinstance(thing, torch.Tensor) and thing.dim() == 4:
            thing = _picture(thing.detach(), titles)
        if hasattr(thing, "savefig"):
            display(thing)
        elif inspect.isclass(thing) or inspect.isfunction(thing):
            print(source(thing))
        else:
            print(thing)


def display(figure: object) -> None:
    """The figure under the cell; IPython itself shows figures of pyplot only."""
    from IPython.display import Image
    from IPython.display import display as below

    png = io.BytesIO()
    figure.savefig(png, dpi=100)
    below(Image(png.getvalue()))


def source(thing: type | Callable[..., object]) -> str:
    """As `inspect.getsource`, also for a class that a notebook's cell defines: its file is that of
    its methods.
    """
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        files = {m.__code__.co_filename for m in vars(thing).values() if inspect.isfunction(m)}
        for text in ("".join(linecache.getlines(file)) for file in files):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef) and node.name == thing.__name__:
                    return ast.get_source_segment(text, node) or ""
        raise


def _picture(x: Tensor, titles: list[str] | None) -> object:
    from common import plotting

    x = x.cpu().float()
    if x.shape[1] != 3:
        x = x.flatten(0, 1).unsqueeze(1).repeat(1, 3, 1, 1)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    images = ((x - low) / (high - low).clamp(min=1e-6)).permute(0, 2, 3, 1).numpy()
    return plotting.image_grid(images, titles or [""] * len(images), "")
