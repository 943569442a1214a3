"""Where the weights come from: a model of the course, one of torchvision's, a run of a lesson."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from common.engine import checkpoint
from common.engine.errors import UserError, unknown
from common.engine.weights import find_bundle, official_state
from common.lessons import lesson_names, load_lesson
from common.pretrained import load_pretrained
from common.transfer.flags import EXTERNAL

if TYPE_CHECKING:
    from types import ModuleType


# ------------------------------------------------------------------------------------------- models


class Catalogue(Mapping):
    """Every model of lessons 01 to 07 by name, and torchvision's as `torchvision:NAME`.

    A lesson is imported when one of its models is asked for and not before.
    """

    def __getitem__(self, name: str) -> Callable[..., nn.Module]:
        if name.startswith(EXTERNAL):
            return partial(TorchvisionModel, name.removeprefix(EXTERNAL))
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


class TorchvisionModel(nn.Module):
    """One of torchvision's classifiers behind the interface of the course's own models.

    `stem`, `stages` and `head` are its top-level parts in their order: what comes before the last
    feature map is a stage, what comes after it is the head. They hold no weights of their own.

    Args:
        name: as torchvision spells it, e.g. "convnext_tiny".
        small_input: only False; torchvision's nets have no form for small images.

    Raises:
        UserError: torchvision has no such classifier.
    """

    def __init__(self, name: str, num_classes: int = 1000, small_input: bool = False) -> None:
        super().__init__()
        from torchvision import models

        known = models.list_models(models)
        if name not in known:
            raise unknown("torchvision model", name, known)
        self.net = models.get_model(name, weights=None)
        if num_classes != self.get_classifier().out_features:
            self.reset_classifier(num_classes)

    def _classifier(self) -> tuple[nn.Module, str]:
        """The module that holds the last linear layer, and the layer's name in it."""
        names = [
            n
            for n, m in self.net.named_modules()
            if isinstance(m, nn.Linear) and not n.lower().startswith("aux")
        ]
        if not names:
            raise UserError("this torchvision model ends in no linear layer")
        parent, _, child = names[-1].rpartition(".")
        return self.net.get_submodule(parent), child

    def get_classifier(self) -> nn.Linear:
        parent, child = self._classifier()
        return getattr(parent, child)

    def reset_classifier(self, num_classes: int) -> None:
        parent, child = self._classifier()
        old = getattr(parent, child)
        setattr(parent, child, nn.Linear(old.in_features, num_classes).to(old.weight))

    def _units(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Top-level parts up to the one that holds the classifier, and the others."""
        children = list(self.net.children())
        units: list[nn.Module] = []
        for child in children:
            units += (
                list(child)
                if isinstance(child, nn.Sequential) and child is not (children[-1])
                else [child]
            )
        classifier = self.get_classifier()
        first = next(i for i, unit in enumerate(units) if classifier in unit.modules())
        body = [u for u in units[:first] if any(True for _ in u.parameters())]
        rest = [u for u in units if not any(u is b for b in body)]
        return body, rest

    @property
    def stem(self) -> nn.Sequential:
        return nn.Sequential(*self._units()[0][:1])

    @property
    def stages(self) -> nn.Sequential:
        return nn.Sequential(*self._units()[0][1:])

    @property
    def head(self) -> nn.Sequential:
        return nn.Sequential(*self._units()[1])

    def forward_features(self, x: Tensor) -> Tensor:
        """The output of the last stage."""
        seen: list[Tensor] = []
        handle = self.stages[-1].register_forward_hook(lambda *parts: seen.append(parts[2]))
        try:
            self.net(x)
        finally:
            handle.remove()
        return seen[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# ---------------------------------------------------------------------------------- trained weights


@dataclass
class Origin:
    """A trained network to start from.

    Attributes:
        name: told in the banner.
        model: with the classifier that it was trained with; None where there are no weights.
        mean_std: of pixels in [0, 1], what its inputs were normalised with.
        class_names: that its classifier tells apart.
        top1: test accuracy on its own classes, where it is known.
    """

    name: str
    model: nn.Module | None = None
    mean_std: tuple[Tensor, Tensor] | None = None
    class_names: list[str] | None = None
    top1: float | None = None

    def save(self, path: Path) -> None:
        state = {
            "name": self.name,
            "model": self.model.state_dict(),
            "mean": self.mean_std[0],
            "std": self.mean_std[1],
            "class_names": self.class_names,
            "top1": self.top1,
        }
        checkpoint.save(path, state)

    @classmethod
    def load(cls, path: Path, build: Callable[[int], nn.Module]) -> Origin:
        state = checkpoint.load(path)
        model = build(len(state["class_names"]))
        model.load_state_dict(state["model"])
        mean_std = state["mean"], state["std"]
        return cls(state["name"], model, mean_std, state["class_names"], state["top1"])


@dataclass
class PastRun:
    """A run folder of any lesson, its best weights loaded on the CPU; or the course's own weights.

    Attributes:
        folder: None for the course's own.
    """

    folder: Path | None
    config: Any
    origin: Origin
    build: Callable[[int], nn.Module]  # the same architecture untrained, for so many classes


def open_run(path: str, here: ModuleType | None = None) -> PastRun:
    """The best weights of a finished run, in the model that its lesson builds.

    Args:
        path: a run folder, or its best.pt; or the name of a model that the course has weights for.
        here: the lesson that asks, so that its own runs don't import it twice.

    Raises:
        UserError: it is no run folder, has no best.pt, or its lesson builds another model today.
    """
    folder = Path(path)
    bundle = None if folder.exists() else find_bundle(path)
    if here is not None and bundle:
        config = here.Config(model=path, image_size=bundle.image_size)
        build = partial(here.build, config)
        return PastRun(None, config, trained_origin(path, build), build)
    folder = folder.parent if folder.suffix == ".pt" else folder
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"--from {path}: no run folder, config.json is not there") from None
    except ValueError as error:
        raise UserError(f"--from {path}: config.json can't be read ({error})") from None
    if not (folder / "best.pt").is_file():
        raise UserError(
            f"--from {path}: no best.pt in it; an experiment leaves none, a training run does"
        )
    lesson = saved.pop("lesson", "")
    module = here if here is not None and lesson == here.LESSON else load_lesson(lesson)
    known = {spec.name for spec in dataclasses.fields(module.Config)}
    config = module.Config(**{name: value for name, value in saved.items() if name in known})
    state = checkpoint.load(folder / "best.pt")
    try:
        model = module.build(config, len(state["class_names"]))
        model.load_state_dict(state["model"])
        if config.pretrained and hasattr(model, "transform_input"):
            model.transform_input = True
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--from {path}: the weights don't fit {config.model} ({reason})") from None
    origin = Origin(
        f"{config.model} of {folder}", model, (state["mean"], state["std"]), state["class_names"]
    )
    return PastRun(folder, config, origin, partial(module.build, config))


def trained_origin(name: str, build: Callable[[int], nn.Module]) -> Origin:
    """What `--pretrained` starts from: the course's own weights of a model, or official ones.

    Args:
        build: the model, untrained, for so many classes.

    Raises:
        UserError: there are none, they can't be had, or they don't fit what `build` makes.
    """
    bundle = find_bundle(name)
    if bundle:
        names = bundle.class_names
        model = load_pretrained(build(len(names)), name, names)
        mean_std = bundle.mean, bundle.std
        return Origin(f"the course's own {name}", model, mean_std, names, bundle.top1)
    load = load_external if name.startswith(EXTERNAL) else load_pretrained
    return Origin(f"official weights of {name}", load(build(2), name))


def load_external(model: TorchvisionModel, name: str) -> TorchvisionModel:
    """Put torchvision's official weights into a `TorchvisionModel`; its classifier stays.

    Raises:
        UserError: there are none, or they can't be downloaded.
    """
    classes = model.get_classifier().out_features
    state = official_state(name.removeprefix(EXTERNAL))
    model.reset_classifier(next(reversed(state.values())).shape[0])
    model.net.load_state_dict(state)
    model.reset_classifier(classes)
    return model
