"""Records as files: written whole or not at all."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.engine.errors import Locked, UserError
from common.engine.signals import StopSignal


def write_json(path: Path, record: object) -> None:
    """Write a dataclass or dict as JSON, whole or not at all."""
    data = asdict(record) if is_dataclass(record) else record
    write_atomically(path, json.dumps(data, indent=2, default=_plain) + "\n")


def write_csv(path: Path, rows: list[Any]) -> None:
    """Write dataclass records or dicts of one kind as CSV with a header, whole or not at all."""
    records = [asdict(row) if is_dataclass(row) else row for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomically(path, text.getvalue())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` in one step, see `replacing`. Its folder is made where there is none.

    Raises:
        UserError: the disk is full or the folder can't be written.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise cannot_write(path, error) from None


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path`, to be written; it goes to the disk, and only then to its name: whenever
    the power fails, `path` is the old file or the new one. A signal waits.
    """
    name = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with StopSignal():
        try:
            with name.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        finally:
            name.unlink(missing_ok=True)
        # The renaming itself, too, where the system can (Windows can't, and needn't; nor can shared
        # folders of VirtualBox and network drives under WSL, which say so by an error).
        if os.name == "posix":
            with suppress(OSError):
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)


def cannot_write(path: Path, error: BaseException, more: str = "") -> UserError:
    """One line for a write that failed, to raise. A full disk is named."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    reason = (cause and cause.strerror) or str(error).split("\n")[0]
    if cause is not None and cause.errno == errno.ENOSPC:
        disk = path.resolve().parent
        while not os.path.ismount(disk):
            disk = disk.parent
        usage = shutil.disk_usage(disk)
        reason = f"{reason}: the disk at {disk} has {usage.free / 2**20:,.0f} MiB free of "
        reason += f"{usage.total / 2**20:,.0f}"
    kind = Locked if isinstance(cause, PermissionError) else UserError
    return kind(f"{path} can't be written ({reason}){more}")


# ------------------------------------------------------------------------------- finished results


class Store:
    """Results by key in one JSON file, each with the settings that it was made under, written as
    soon as it's there, so that what was stopped goes on where it was.

    What was made under other settings is left out, and replaced when it is made again, so that a
    table never mixes the two.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], tell: bool = False) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # as it will read back: tuples are lists
        self.results: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                saved = json.loads(path.read_text(encoding="utf-8"))
                self.results = {k: v for k, v in saved.items() if v["settings"] == self.settings}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{path} can't be read ({error}): remove it, and all is measured again"
                ) from None
            others = len(saved) - len(self.results)
            if tell:
                print(f"resume     {len(self.results)} results read from {path.name}", flush=True)
            if others:
                print(f"resume     {others} in {path.name} are of other settings: made again")

    def get(self, key: str) -> dict[str, Any] | None:
        """The fields of the record kept under `key`, or None."""
        return self.results[key]["result"] if key in self.results else None

    def put(self, key: str, record: object) -> None:
        result = asdict(record) if is_dataclass(record) else record
        self.results[key] = {"settings": self.settings, "result": result}
        write_json(self.path, self.results)


# ------------------------------------------------------------------------------------------ locks

_locks: dict[Path, IO[bytes]] = {}  # of this process, until it ends or gives them back


def lock(path: Path, sure: bool = False) -> bool:
    """Whether this process has the lock that the file `path` stands for, now or since before.

    The system takes it back when the process ends, however it ends. True too where the file system
    knows no locks, if one needn't be sure.
    """
    path = path.resolve()
    if path in _locks:
        return True
    file = path.open("ab")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked worker doesn't inherit it
    except OSError as error:
        if sure or error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            file.close()
            return False
    _locks[path] = file
    return True


def unlock(path: Path) -> None:
    if file := _locks.pop(path.resolve(), None):
        file.close()


def claim_folder(folder: Path) -> None:
    """Keep the run folder for this process until it ends; remove what killed runs left half-written
    in it and in its neighbours.

    Raises:
        UserError: another process is working in it.
    """
    if not lock(folder / ".lock"):
        raise UserError(
            f"{folder}: another process is working in this folder: wait for it, or stop it"
        )
    for left in folder.parent.glob("*/.*.tmp"):
        mine = left.parent.resolve() == folder.resolve()
        if mine or lock(left.parent / ".lock", sure=True):
            left.unlink(missing_ok=True)
            if not mine:
                unlock(left.parent / ".lock")


def _plain(value: object) -> object:
    """numpy scalars and arrays, and paths, as what JSON knows."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not belong in a record")
