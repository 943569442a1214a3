"""The folder of a run, its checkpoints, and whether they belong to it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from common.engine import checkpoint, processes
from common.engine.errors import UserError
from common.engine.files import claim_folder, write_json
from common.engine.signals import on_leave
from common.engine.surroundings import command


class RunFolder:
    """Where a run keeps its checkpoints, and how it goes on from them."""

    current: RunFolder | None = None  # the one to be named when a signal ends the process

    def __init__(self, folder: Path, config: Any, lesson: str, resumed: bool) -> None:
        self.folder, self.config, self.lesson, self.resumed = folder, config, lesson, resumed
        self.last, self.best = folder / "last.pt", folder / "best.pt"

    @classmethod
    def open(cls, config: Any, lesson: str) -> RunFolder:
        """A new folder, or that of the run that `--resume` names.

        Raises:
            UserError: the folder can't be written; better now than after the first epoch.
        """
        folder = None
        if processes.is_main():
            folder = cls._find(config, lesson)
            claim_folder(Path(folder[0]))
        folder, resumed = processes.from_main(folder)
        RunFolder.current = cls(Path(folder), config, lesson, resumed)
        return RunFolder.current

    @classmethod
    def _find(cls, config: Any, lesson: str) -> tuple[str, bool]:
        if config.resume:
            path = Path(config.resume)
            return str(path if path.is_dir() else path.parent), True
        model, *others = config.model.split(",")  # lesson 7 compares many
        model = model.strip().replace(":", "-")  # torchvision:NAME; Windows has no colon in names
        model += f"-and-{len(others)}-more" if others else ""
        stem = f"{config.experiment or model}-{config.dataset}-s{config.seed}"
        plain = {"lesson": lesson, **config.to_dict(), "resume": ""}
        return new(Path(config.run_dir), lesson, stem, plain)

    # -- checkpoints

    def save(self, state: dict[str, Any]) -> None:
        if processes.is_main():
            checkpoint.save(
                self.last, {"lesson": self.lesson, "world": processes.world_size(), **state}, True
            )

    def load(self, data: Any) -> dict[str, Any] | None:
        """The state to go on from, or None at the start.

        Raises:
            UserError: the checkpoint is damaged, or of another lesson, config, dataset or number of
                processes.
        """
        if not self.resumed:
            return None
        path = Path(self.config.resume or self.last)
        path = path if path.is_file() else self.last
        if not path.exists() and not checkpoint.previous(self.last).exists():
            if processes.is_main():
                print(
                    f"resume     {self.folder} was stopped before its first checkpoint: "
                    f"starting over"
                )
            return None
        state = checkpoint.load_latest(path)
        here = {"lesson": self.lesson, "data": data.fingerprint, "world": processes.world_size()}
        check(state, path, self.last, here, self.config)
        if processes.is_main():
            meter = state["meter"]
            print(
                f"resume     after {meter['epoch']} epochs and {meter['batch']} batches", flush=True
            )
        return state

    def save_best(self, model: nn.Module, best: dict[str, Any], data: Any) -> None:
        """The weights of the best epoch, with what it
        takes to use them: classes and normalisation.
        """
        if processes.is_main():
            state = {
                "lesson": self.lesson,
                "config": self.config.to_dict(),
                "model": model.state_dict(),
                "class_names": data.class_names,
                "mean": data.mean,
                "std": data.std,
                "best": best,
            }
            checkpoint.save(self.best, state)
        processes.wait_for_all()  # the others read it at the end

    def load_best(self) -> dict[str, Any]:
        state = checkpoint.load(self.best)
        checkpoint.check(state, checkpoint.BEST, self.best)
        return state

    def kept(self) -> str:
        return f"; the last good state is in {self.folder}"

    def farewell(self) -> str:
        return f"stopped; everything is saved. Go on with: {command('--resume', str(self.folder))}"


@on_leave
def how_to_go_on() -> str | None:
    """Of the run in hand, once it has a checkpoint."""
    run = RunFolder.current
    return run.farewell() if run is not None and run.last.exists() else None


def new(run_dir: Path, lesson: str, stem: str, settings: Mapping[str, Any]) -> tuple[str, bool]:
    """Make RUN_DIR/LESSON/STEM-TIME with config.json in it; the folder, and False: not resumed.

    Raises:
        UserError: it can't be made or written; better now than after the first epoch.
    """
    parent = run_dir / lesson
    # torchrun starts its processes again after a fault, with the flags of the first time.
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        for earlier in sorted(parent.glob(f"{stem}-*"), reverse=True):
            if (earlier / "last.pt").exists() and _settings(earlier) == settings:
                return str(earlier), True
    name = base = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for again in range(2, 1000):
        try:
            (parent / name).mkdir(parents=True)
            break
        except FileExistsError:
            if not parent.is_dir():
                raise UserError(f"--run-dir {run_dir}: a file is in the way") from None
            name = f"{base}-{again}"
        except OSError as error:
            raise UserError(f"--run-dir {run_dir} can't be written ({error.strerror})") from None
    write_json(parent / name / "config.json", settings)
    return str(parent / name), False


def check(
    state: Mapping[str, Any], path: Path, last: Path, here: Mapping[str, Any], config: Any
) -> None:
    """Whether a checkpoint is of the run that would go on from it.

    Args:
        here: "lesson", "data" (the fingerprint of the images) and "world" (processes) of that run.

    Raises:
        UserError: it holds weights only, or is of another lesson, config, dataset or number of
            processes.
    """
    if "optimizer" not in state:
        raise UserError(f"{path} holds weights only, no training state: resume {last}")
    checkpoint.check(state, checkpoint.LAST, path)
    if state["lesson"] != here["lesson"]:
        raise UserError(f"{path} is of {state['lesson']}, not of {here['lesson']}")
    now = config.to_dict()
    for name, value in state["config"].items():
        if name not in config.FREE_ON_RESUME and now.get(name) != value:
            raise UserError(
                f"{path} was made with {name} {value}, not {now.get(name)}: start a new run instead"
            )
    if state["data"] != here["data"]:
        raise UserError(
            f"{path}: the images in {config.data_dir} have changed since this run began"
        )
    if state["world"] != here["world"]:
        raise UserError(
            f"{path} was made by {state['world']} processes, not {here['world']}: resume with as "
            "many"
        )


def _settings(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
