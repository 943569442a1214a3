"""The folder of a run: a new one for each, and whether a checkpoint belongs to it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.engine import checkpoint
from common.engine.errors import UserError
from common.engine.files import write_json


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
