"""Records as files: written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np


def write_json(path: Path, record: object) -> None:
    """Write a dataclass or dict as JSON, whole or not at all."""
    data = asdict(record) if hasattr(record, "__dataclass_fields__") else record
    write_atomically(path, json.dumps(data, indent=2, default=_plain) + "\n")


def write_csv(path: Path, rows: list[Any]) -> None:
    """Write a list of dataclass records of one type as CSV with a header, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomically(path, text.getvalue())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` in one step: a reader, or a crash,
    sees the old file or the new one, never half of it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: object) -> object:
    """numpy scalars and arrays, paths and tuples as what JSON knows."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not belong in a record")
