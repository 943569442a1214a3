"""The course's own weights: a finished run made into a small file that travels with the course.

    python -m common.bundle runs/01_resnet_beginner/NAME --trained-on CIFAR-10

writes common/weights/MODEL.pt, which `--pretrained --model MODEL` takes before it asks the network
for official weights, and MODEL.json beside it: how the weights came about and how good they are.
The same run gives the same bytes. `--half` rounds each number to 16 bits, for half the bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.cli import OneLineParser, exit_codes
from common.config import TrainConfig
from common.engine import checkpoint, weights
from common.engine.errors import UserError
from common.engine.files import write_json
from common.engine.weights import Bundle
from common.profiling import count_parameters


def pack(run: str | Path, trained_on: str = "", half: bool = False) -> Path:
    """Write MODEL.pt and MODEL.json from the best weights of a finished run; returns the first.

    Args:
        run: a run folder of lessons 1 to 6.
        trained_on: the data in words; by default the name of the run's dataset.
        half: keep weights and statistics in float16.

    Raises:
        UserError: it is no run folder, the run isn't finished, its parts don't fit together, or a
            number is beyond float16's 65,504.
    """
    folder = Path(run)
    saved = _read(folder, "config.json", "it is no run folder")
    result = _read(folder, "result.json", "the run isn't finished (or was an experiment)")
    best = checkpoint.load(folder / "best.pt")
    if saved["smoke"]:
        raise UserError(f"{folder}: a smoke run, which has learned nothing")
    if best["best"]["epoch"] != result["best_epoch"] or best["config"]["model"] != saved["model"]:
        raise UserError(f"{folder}: best.pt and result.json are of two different runs")

    from common.lessons import load_lesson  # lessons stand above the services

    lesson = load_lesson(saved.pop("lesson"))
    known = {spec.name for spec in dataclasses.fields(lesson.Config)}
    config = lesson.Config(**{name: value for name, value in saved.items() if name in known})
    precision = torch.float16 if half else torch.float32
    state = {
        name: (value.to(precision) if value.is_floating_point() else value).clone()
        for name, value in best["model"].items()
    }
    if beyond := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"{folder}: {beyond[0]} of best.pt is not finite in {precision}")
    model = lesson.build(config, len(best["class_names"]))
    try:
        model.load_state_dict(state)
    except RuntimeError:
        changed = f"{config.model} has another form today than in best.pt"
        raise UserError(f"{folder}: {changed}") from None

    bundle = Bundle(
        config.model, trained_on or config.dataset, result["test_top1"], best["class_names"],
        best["mean"].float(), best["std"].float(), config.image_size, state,
    )  # fmt: skip
    weights.WEIGHTS.mkdir(exist_ok=True)
    path = weights.WEIGHTS / f"{bundle.name}.pt"
    checkpoint.save(path, vars(bundle))
    told = (
        "test_top1 val_top1 epochs best_epoch seed train_seconds images_per_second device hardware "
        "amp torch_version test_top1_views"
    )
    record = {
        "model": bundle.name,
        "trained_on": bundle.trained_on,
        "command": command(lesson.__name__, config),
        "parameters": count_parameters(model),
        "sha256": digest(state),
        **{name: result[name] for name in told.split() if name in result},
        "image_size": bundle.image_size,
        "class_names": bundle.class_names,
        "mean": bundle.mean.tolist(),
        "std": bundle.std.tolist(),
    }
    write_json(path.with_suffix(".json"), record)
    return path


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values: the same in whatever kind of file they lie."""
    sha = hashlib.sha256()
    for name, value in state.items():
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.contiguous().numpy().tobytes())
    return sha.hexdigest()


def command(lesson: str, config: TrainConfig) -> str:
    """The shortest command line that comes out as `config`, its data folder called DIR.

    A saved config has everything filled in; a flag that the recipe fills in by itself is left out.
    """
    kind = type(config)
    here = {"data_dir", *kind.FREE_ON_RESUME}  # where it ran, not what was computed
    defaults = kind()

    def settings(config: TrainConfig) -> dict[str, Any]:
        return {n: v for n, v in config.to_dict().items() if n not in here}

    given = {n: v for n, v in settings(config).items() if v != getattr(defaults, n)}
    for name in [n for n in given if n not in ("model", "dataset")]:
        rest = {n: v for n, v in given.items() if n != name}
        if settings(kind(**rest).resolve(config.dataset)) == settings(config):
            given = rest
    words = ["python", f"{lesson}.py"]
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    if config.dataset in ("folder", "imagenet"):
        words += ["--data-dir", "DIR"]
    return " ".join(words)


def _read(folder: Path, name: str, otherwise: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {name}: {otherwise}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / name} can't be read ({error})") from None


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m common.bundle", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="folder of a finished run of lessons 1 to 6")
    parser.add_argument("--trained-on", default="", help="its data in words, for the record")
    parser.add_argument("--half", action="store_true", help="round to 16 bits, for half the bytes")
    flags = parser.parse_args(argv)
    with exit_codes():
        path = pack(flags.run, flags.trained_on, flags.half)
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        print(
            f"{path}: {record['model']}, {record['parameters']:,} parameters, test top-1 "
            f"{record['test_top1']:.2%}, {path.stat().st_size:,} bytes"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
