"""The folder of a run, its checkpoints, and whether they belong to it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from common.engine import checkpoint, processes
from common.engine.errors import UserError
from common.engine.files import claim_folder, lock, write_json
from common.engine.overview import write_index
from common.engine.signals import on_leave
from common.engine.surroundings import command

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunFolder:
    """Where a run keeps its checkpoints, and how it goes on from them."""

    current: RunFolder | None = None  # the one to be named when a signal ends the process

    def __init__(self, folder: Path, config: Any, lesson: str, resumed: bool) -> None:
        self.folder, self.config, self.lesson, self.resumed = folder, config, lesson, resumed
        self.last, self.best = folder / "last.pt", folder / "best.pt"
        self.figures: list[Path] = []
        self.warned = False  # that history.csv is held by another program

    @classmethod
    def open(cls, config: Any, lesson: str) -> RunFolder:
        """A new folder, or that of the run that `--resume` names.

        Raises:
            UserError: the folder can't be written; better now than after the first epoch.
        """
        found = None
        if processes.is_main():
            given = Path(config.resume)
            where = given if given.is_dir() else given.parent
            found = (where, True) if config.resume else _new(config, lesson)
            claim_folder(found[0])
        folder, resumed = processes.from_main(found)
        RunFolder.current = cls(folder, config, lesson, resumed)
        return RunFolder.current

    @cached_property
    def tensorboard(self) -> SummaryWriter:
        """The writer of TensorBoard's files, for `--track`: one of events for a process."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.folder / "tensorboard")

    # -- checkpoints

    def save(self, state: dict[str, Any]) -> None:
        if processes.is_main():
            of_run = {"lesson": self.lesson, "world": processes.world_size()}
            checkpoint.save(self.last, {**of_run, **state}, keep_previous=True)

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
                why = "was stopped before its first checkpoint"
                print(f"resume     {self.folder} {why}: starting over")
            return None
        state = checkpoint.load_latest(path)
        self._check(state, path, data)
        if processes.is_main():
            done = "{epoch} epochs and {batch} batches".format(**state["meter"])
            print(f"resume     after {done}", flush=True)
        return state

    def _check(self, state: Mapping[str, Any], path: Path, data: Any) -> None:
        if "optimizer" not in state:
            raise UserError(f"{path} holds weights only, no training state: resume {self.last}")
        checkpoint.check(state, checkpoint.LAST, path)
        if state["lesson"] != self.lesson:
            raise UserError(f"{path} is of {state['lesson']}, not of {self.lesson}")
        now = self.config.to_dict()
        for name, value in state["config"].items():
            if name not in self.config.FREE_ON_RESUME and now.get(name) != value:
                raise UserError(
                    f"{path} was made with {name} {value}, not {now.get(name)}: start a new run "
                    "instead"
                )
        if state["data"] != data.fingerprint:
            where = self.config.data_dir
            raise UserError(f"{path}: the images in {where} have changed since this run began")
        if state["world"] != (world := processes.world_size()):
            raise UserError(
                f"{path} was made by {state['world']} processes, not {world}: resume with as many"
            )

    def save_best(self, model: nn.Module, best: dict[str, Any], data: Any) -> None:
        """The weights of the best epoch, with the classes and the normalisation to use them by."""
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

    def where(self) -> str:
        """What of this the last lines of a run name: the page of all runs, written anew. A run that
        was copied elsewhere, out of RUN_DIR/LESSON/, has none beside it.
        """
        for lesson in (self.folder.parent, Path(os.path.abspath(self.folder)).parent):
            if lesson.name == self.lesson:  # as it was typed, or from inside of RUN_DIR
                try:
                    return f", all runs: {write_index(lesson.parent)}"
                except UserError as error:  # another user's, perhaps: the run itself is done
                    return f"\nwarning    {error}"
        return ""

    def kept(self) -> str:
        return f"; the last good state is in {self.folder}"

    def farewell(self) -> str:
        return f"stopped; everything is saved. Go on with: {self.go_on()}"

    def go_on(self) -> str:
        """The command that goes on, with what has changed of where it runs since it began."""
        saved, flags = settings_of(self.folder) or {}, []
        for name in sorted(self.config.FREE_ON_RESUME - {"resume", "run_dir"}):
            value, flag = getattr(self.config, name), name.replace("_", "-")
            if value == saved.get(name):
                continue
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                flags += [f"--{flag}", str(value)]
        return command("--resume", str(self.folder), *flags)


@on_leave
def how_to_go_on() -> str | None:
    """Of the run in hand, once it has a checkpoint."""
    run = RunFolder.current
    return run.farewell() if run is not None and run.last.exists() else None


def _new(config: Any, lesson: str) -> tuple[Path, bool]:
    """Make RUN_DIR/LESSON/STEM-TIME with config.json in it; the folder, and False: not resumed.

    Raises:
        UserError: it can't be made or written; better now than after the first epoch.
    """
    model, *others = config.model.split(",")  # lesson 7 compares many
    model = model.strip().replace(":", "-")  # torchvision:NAME; Windows has no colon in names
    model += f"-and-{len(others)}-more" if others else ""
    stem = f"{config.experiment or model}-{config.dataset}-s{config.seed}"
    settings = {"lesson": lesson, **config.to_dict(), "resume": ""}
    parent = Path(config.run_dir) / lesson
    # torchrun starts its processes again after a fault, with the flags of the first time.
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        for earlier in sorted(parent.glob(f"{stem}-*"), reverse=True):
            if (earlier / "last.pt").exists() and settings_of(earlier) == settings:
                return earlier, True
    folder = base = parent / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for again in range(2, 1000):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if not parent.is_dir():
                raise UserError(f"--run-dir {config.run_dir}: a file is in the way") from None
            folder = base.with_name(f"{base.name}-{again}")
        except OSError as error:
            why = f"can't be written ({error.strerror})"
            raise UserError(f"--run-dir {config.run_dir} {why}") from None
    lock(folder / ".lock")  # before a run that begins beside it takes what is written for leavings
    write_json(folder / "config.json", settings)
    return folder, False


def settings_of(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
