"""Finds the lessons: their names start with a digit, so `import` can't spell them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from common.engine.errors import unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from torch import nn

ROOT = Path(__file__).resolve().parent.parent


def lesson_names() -> list[str]:
    """The lessons' module names in order: `["01_resnet_beginner", ...]`."""
    return sorted(path.stem for path in ROOT.glob("[0-9][0-9]_*.py"))


def lesson_file(name: str) -> Path:
    """The lesson's path, from its number, name or file.

    >>> lesson_file("1").name
    '01_resnet_beginner.py'

    Raises:
        UserError: there is no such lesson; the message names the closest one.
    """
    names = lesson_names()
    found = {lesson[:2]: lesson for lesson in names}.get(name.zfill(2), Path(name).stem)
    if found not in names:
        raise unknown("lesson", name, names)
    return ROOT / f"{found}.py"


def load_lesson(name: str) -> ModuleType:
    """The lesson as a module.  Raises: UserError, as `lesson_file`."""
    module_name = lesson_file(name).stem
    import torch  # every lesson does

    with torch.device("cpu"):  # torch 2.6's own modules can't be imported under "meta"
        return importlib.import_module(module_name)


class Models(Mapping):
    """Every model of lessons 01 to 07 by name, in the lessons' order.

    A lesson is imported when one of its models is asked for and not before.
    """

    def __getitem__(self, name: str) -> Callable[..., nn.Module]:
        for models in self._lessons():
            if name in models:
                return models[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        for models in self._lessons():
            yield from models

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _lessons(self) -> Iterator[Mapping[str, Callable[..., nn.Module]]]:
        for lesson in lesson_names():
            if lesson < "08":
                yield getattr(load_lesson(lesson), "MODELS", {})


def get_model(name: str) -> Callable[..., nn.Module]:
    """The builder of one model of the course.

    Raises:
        UserError: there is no such model; the message names the closest one.
    """
    models = Models()
    if name not in models:
        raise unknown("model", name, models)
    return models[name]
