"""Where the weights come from: a model of the course, one of torchvision's, a run of a lesson."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from common.engine import checkpoint
from common.engine.errors import UserError, unknown
from common.engine.files import write_json
from common.engine.weights import find_bundle
from common.lessons import Models, load_lesson
from common.pretrained import copy_bundle, load_pretrained
from common.transfer.flags import EXTERNAL

MADE = "made.json"  # how the net of a run was built that started from another run

# ------------------------------------------------------------------------------------------- models


class Catalogue(Models):
    """Every model of lessons 01 to 07 by name, and torchvision's as `torchvision:NAME`."""

    def __getitem__(self, name: str) -> Callable[..., nn.Module]:
        if name.startswith(EXTERNAL):
            return partial(TorchvisionModel, name.removeprefix(EXTERNAL))
        return super().__getitem__(name)


class TorchvisionModel(nn.Module):
    """One of torchvision's classifiers behind the interface of the course's own models.

    `stem`, `stages` and `head` are its top-level parts in their order: what comes before the last
    feature map is a stage, what comes after it is the head. They hold no weights of their own.

    NOTE: `small_input` changes nothing; torchvision's nets have no form for small images. GoogLeNet
    and Inception-v3 come without their auxiliary heads, which help long trainings.

    Raises:
        UserError: torchvision has no such classifier.
    """

    def __init__(self, name: str, num_classes: int = 1000, small_input: bool = False) -> None:
        super().__init__()
        from torchvision import models

        known = models.list_models(models)
        if name not in known:
            raise unknown("torchvision model", name, known)
        with_heads = name in ("googlenet", "inception_v3")  # official inputs are from -1 to 1
        options = {"aux_logits": False, "transform_input": True, "init_weights": False}
        self.net = models.get_model(name, weights=None, **(options if with_heads else {}))
        self.channels_at_end = name.startswith("swin")  # of its stages' outputs, (N, h, w, C)
        linear = [n for n, m in self.net.named_modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise UserError("this torchvision model ends in no linear layer")
        self.last = linear[-1]  # the classifier's path
        if num_classes != self.get_classifier().out_features:
            self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Linear:
        return self.net.get_submodule(self.last)

    def reset_classifier(self, num_classes: int) -> None:
        old = self.get_classifier()
        parent, _, name = self.last.rpartition(".")
        bias = old.bias is not None  # MaxViT has none
        new = nn.Linear(old.in_features, num_classes, bias).to(old.weight)
        setattr(self.net.get_submodule(parent), name, new)

    def _units(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Top-level parts up to the one that holds the classifier, and the others."""
        *children, last = self.net.children()
        units: list[nn.Module] = []
        for child in children:
            units += child if isinstance(child, (nn.Sequential, nn.ModuleList)) else [child]
        units.append(last)
        classifier = self.get_classifier()
        first = next(i for i, unit in enumerate(units) if classifier in unit.modules())
        body = [unit for unit in units[:first] if list(unit.parameters())]
        return body, [unit for unit in units if unit not in body]

    @property
    def stem(self) -> nn.Sequential:
        return nn.Sequential(*self._units()[0][:1])

    @property
    def stages(self) -> nn.Sequential:
        return nn.Sequential(*self._units()[0][1:])

    @property
    def head(self) -> nn.Sequential:
        return nn.Sequential(*self._units()[1])

    def arrange_torchvision_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without what belongs to auxiliary heads."""
        return {k: v for k, v in state_dict.items() if not k.lower().startswith("aux")}

    def forward_features(self, x: Tensor) -> Tensor:
        """The output of the last stage."""
        seen: list[Tensor] = []
        with self.stages[-1].register_forward_hook(lambda *parts: seen.append(parts[2])):
            self.net(x)
        return seen[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# ---------------------------------------------------------------------------------- trained weights


@dataclass
class Origin:
    """A trained network to start from."""

    name: str  # told in the banner
    model: nn.Module | None = None  # with its own classifier; None where there are no weights
    mean_std: tuple[Tensor, Tensor] | None = None  # of its inputs, pixels in [0, 1]
    class_names: list[str] | None = None  # that its classifier tells apart
    top1: float | None = None  # test accuracy on these, where it is known
    made: dict[str, Any] | None = None  # settings of the run whose lesson built it

    def save(self, path: Path) -> None:
        if self.made:  # beside it: what is trained on is built in the same way
            write_json(path.with_name(MADE), self.made)
        mean, std = self.mean_std
        facts = {"name": self.name, "class_names": self.class_names, "top1": self.top1}
        checkpoint.save(path, {**facts, "model": self.model.state_dict(), "mean": mean, "std": std})

    @classmethod
    def load(cls, path: Path, build: Callable[[int], nn.Module]) -> Origin:
        state = checkpoint.load(path)
        names, mean_std = state["class_names"], (state["mean"], state["std"])
        model = build(len(names))
        model.load_state_dict(state["model"])
        return cls(state["name"], model, mean_std, names, state["top1"])


@dataclass
class PastRun:
    """A run folder of any lesson, its best weights on the CPU; or the course's own weights."""

    folder: Path | None  # None for the course's own
    config: Any
    origin: Origin
    build: Callable[[int], nn.Module]  # the same architecture untrained, for so many classes


def open_run(path: str, here: ModuleType) -> PastRun:
    """The best weights of a finished run, in the model that its lesson builds.

    Args:
        path: a run folder, or its best.pt; or the name of a model that the course has weights for.
        here: the lesson that asks, so that its own runs don't import it twice.

    Raises:
        UserError: it is no run folder, has no best.pt, or its lesson builds another model today.
    """
    folder = Path(path)
    if not folder.exists() and (bundle := find_bundle(path)):
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
    made = folder / MADE  # it started from another run, whose lesson built it
    made = json.loads(made.read_text(encoding="utf-8")) if made.is_file() else saved
    (_, config), (module, maker) = _settings(saved, here), _settings(made, here)
    state = checkpoint.load(folder / "best.pt")
    build = partial(_plain, module.build, maker)
    try:
        # Side classifiers are trained by lesson 3's loss alone.
        model = build(len(state["class_names"]))
        mine = {k: v for k, v in state["model"].items() if not k.startswith("aux_heads.")}
        model.load_state_dict(mine)
        if maker.pretrained and hasattr(model, "transform_input"):
            model.transform_input = True
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--from {path}: the weights don't fit {config.model} ({reason})") from None
    mean_std, name = (state["mean"], state["std"]), f"{config.model} of {folder}"
    origin = Origin(name, model, mean_std, state["class_names"], made=made)
    return PastRun(folder, config, origin, build)


def open_asked(config: Any, here: ModuleType) -> PastRun:
    """The run of `--from`, whose model is its own.

    Raises:
        UserError: as `open_run`, or `--model` names another.
    """
    past = open_run(config.from_run, here)
    if config.model not in (past.config.model, type(config).model):
        raise UserError(
            f"--model {config.model}: {config.from_run} has a {past.config.model}; leave out one "
            "of --model and --from"
        )
    return past


def _settings(saved: dict[str, Any], here: ModuleType) -> tuple[ModuleType, Any]:
    """The lesson of a config.json, and its settings."""
    lesson = saved.get("lesson", "")
    module = here if lesson == here.LESSON else load_lesson(lesson)
    known = {spec.name for spec in dataclasses.fields(module.Config)}
    return module, module.Config(**{name: v for name, v in saved.items() if name in known})


def _plain(build: Callable[[Any, int], nn.Module], config: Any, num_classes: int) -> nn.Module:
    """What a lesson builds, without side classifiers: in training they make a tuple of logits."""
    model = build(config, num_classes)
    if hasattr(model, "aux_heads"):
        model.aux_heads.clear()
    return model


def trained_origin(name: str, build: Callable[[int], nn.Module]) -> Origin:
    """What `--pretrained` starts from: the course's own weights of a model, or official ones.

    Raises:
        UserError: there are none, they can't be had, or they don't fit what `build` makes.
    """
    if bundle := find_bundle(name):
        model = build(len(bundle.class_names))
        copy_bundle(model, bundle)
        known = (bundle.mean, bundle.std), bundle.class_names, bundle.top1
        return Origin(f"the course's own {name}", model, *known)
    model = load_pretrained(build(2), name.removeprefix(EXTERNAL))
    return Origin(f"official weights of {name}", model)
