"""Checkpoints that survive: written whole or not at all, checked when read, never executed."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.engine import files
from common.engine.errors import UserError
from common.engine.records import EpochRecord

FORMAT = 1  # of the dicts below; a file of another format is refused, not guessed at

# What zipfile, zlib and torch make of broken bytes.
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, LookupError, ValueError)

Schema = dict[str, Any]  # key -> type, schema of a dict, or [schema of each item]
_BEST: Schema = {"top1": float, "loss": float, "epoch": int}
BEST: Schema = {
    "lesson": str, "config": dict, "model": dict, "class_names": [str], "mean": Tensor,
    "std": Tensor, "best": _BEST,
}  # fmt: skip
_EPOCH = {name: {"int": int}.get(t, float) for name, t in EpochRecord.__annotations__.items()}
LAST: Schema = {
    "lesson": str, "world": int, "config": dict, "data": str, "model": dict, "optimizer": dict,
    "schedule": dict, "meter": {"epoch": int, "batch": int, "sums": Tensor, "seconds": float},
    "history": [_EPOCH], "best": _BEST, "rng": [dict], "batching": [int],
}  # fmt: skip


def save(path: Path, state: dict[str, Any], keep_previous: bool = False) -> None:
    """Write `state` (plain values and tensors) to `path` in one step.

    Args:
        keep_previous: leave the file that is replaced as `previous.pt` beside it.

    Raises:
        UserError: the disk is full or the folder can't be written; what was at `path` is still
            there.
    """
    try:
        with files.replacing(path) as file:
            torch.save({"format": FORMAT, **state}, file)
            if keep_previous and path.exists():
                _link(path, previous(path))
    # torch wraps a failed write in a RuntimeError of its zip writer.
    except (OSError, RuntimeError) as error:
        kept = "the previous checkpoint is untouched" if path.exists() else "nothing was lost"
        raise files.cannot_write(path, error, f"; {kept}: resume when there is room") from None


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Loads tensors and plain values only, so no file can run code.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint of this format.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        # torch itself doesn't verify the checksums that it writes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"{path} is damaged ({damaged} fails its checksum)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN as error:
        why = (str(error) or "it ends too early").splitlines()[0]
        raise UserError(f"{path} is truncated or no checkpoint ({why})") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors and plain values, so it was not loaded"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path} is of checkpoint format {found}, this version reads {FORMAT}")
    return state


def check(state: Any, schema: Any, path: Path, where: str = "") -> None:
    """Whether `state` has every key that the schema names, of its type.

    Raises:
        UserError: the first that is missing or of another type.
    """
    if isinstance(schema, dict):
        check(state, dict, path, where)
        for key, part in schema.items():
            name = f"{where}.{key}".lstrip(".")
            if key not in state:
                raise UserError(f"{path} has no {name}: it's damaged, or of another version")
            check(state[key], part, path, name)
    elif isinstance(schema, list):
        check(state, list, path, where)
        for item in state:
            check(item, schema[0], path, where)
    elif not isinstance(state, (int, float) if schema is float else schema):
        kind = type(state).__name__
        raise UserError(
            f"{path}: {where or 'it'} is of type {kind}, not {schema.__name__}: it's damaged, or "
            "of another version"
        )


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Inside, the state in `path` goes into a model, an optimizer, ...; one line if it doesn't fit.

    Raises:
        UserError: the weights are of another model, a part is damaged.
    """
    try:
        yield
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        first = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path} doesn't fit this run ({first}): it's of another model or version; start anew"
        ) from None


def load_latest(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`; if it is damaged, the one before it, and a line that says so."""
    before = previous(path)
    try:
        return load(path)
    except UserError as error:
        if not before.exists():
            raise
        state = load(before)
        print(f"warning: {error}; going on from {before.name}, the one before it", flush=True)
        return state


def previous(path: Path) -> Path:
    return path.with_name("previous.pt")


def _link(path: Path, other: Path) -> None:
    """Give the file at `path` a second name, so that replacing the first leaves it alone."""
    spare = other.with_name(f".{other.name}.{os.getpid()}.tmp")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, spare)
    os.replace(spare, other)
