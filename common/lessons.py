"""Finds the lessons: their names start with a digit, so `import` can't spell them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from common.engine.errors import unknown

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from torch import nn

ROOT = Path(__file__).resolve().parent.parent


def lesson_names() -> list[str]:
    """The lessons' module names in order: `["01_resnet_beginner", ...]`."""
    return sorted(path.stem for path in ROOT.glob("[0-9][0-9]_*.py"))


def load_lesson(name: str) -> ModuleType:
    """The lesson as a module, by its number ("01") or its whole name ("01_resnet_beginner").

    >>> load_lesson("01").__name__
    '01_resnet_beginner'

    Raises:
        UserError: there is no such lesson; the message names the closest one.
    """
    names = lesson_names()
    module_name = {lesson[:2]: lesson for lesson in names}.get(name, name)
    if module_name not in names:
        raise unknown("lesson", name, names)
    import torch  # every lesson does

    with torch.device("cpu"):  # torch 2.6's own modules can't be imported under "meta"
        return importlib.import_module(module_name)


def all_models() -> dict[str, Callable[..., nn.Module]]:
    """Every model of lessons 01 to 07 by name, in the lessons' order.

    Raises:
        ValueError: two lessons use one name.
    """
    models: dict[str, Callable[..., nn.Module]] = {}
    for lesson in lesson_names():
        found = getattr(load_lesson(lesson), "MODELS", {}) if lesson < "08" else {}
        if twice := models.keys() & found.keys():
            raise ValueError(f"{lesson} defines {min(twice)} again")
        models |= found
    return models


def get_model(name: str) -> Callable[..., nn.Module]:
    """The builder of one model of the course.

    Raises:
        UserError: there is no such model; the message names the closest one.
    """
    models = all_models()
    if name not in models:
        raise unknown("model", name, models)
    return models[name]
