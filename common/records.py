"""What a run is, as plain data: no torch here, so that plotting and reading results stay light."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class EpochRecord:
    """One row of history.csv. Losses are means over images, accuracies fractions in [0, 1]."""

    epoch: int  # 1 for the first
    lr: float  # at the end of the epoch
    train_loss: float
    train_top1: float
    val_loss: float
    val_top1: float
    seconds: float  # training and validation
    images_per_second: float  # training alone


@dataclass(frozen=True)
class ClassRecord:
    """How one class fared, by scikit-learn's definitions; fractions in [0, 1]."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int  # images of this class


@dataclass(frozen=True)
class Evaluation:
    """What a model said about every image of one split, and how that scores."""

    loss: float
    top1: float
    top5: float
    targets: np.ndarray  # (N,) int64
    probabilities: np.ndarray  # (N, K) float32
    per_class: list[ClassRecord] = field(default_factory=list)

    @property
    def predictions(self) -> np.ndarray:
        """(N,) int64, the most probable class of each image."""
        return self.probabilities.argmax(axis=1)


@dataclass(frozen=True)
class LayerRecord:
    """One line of the layer table."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    params: int
    macs: int
    depth: int = 0  # nesting, for indentation


@dataclass(frozen=True)
class Profile:
    """What a model costs on one device."""

    params: int
    macs: int  # multiply-adds for one image
    latency_ms: float  # median for one batch
    latency_iqr_ms: float  # interquartile range of the same
    peak_memory_mb: float  # during inference, weights included
    device: str
    batch_size: int
    dtype: str
    input_size: tuple[int, int, int]  # (C, H, W)

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch_size / self.latency_ms


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
