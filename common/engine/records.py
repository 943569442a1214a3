"""What a run is, as plain data: no torch here, so that plotting and reading results stay light."""

from __future__ import annotations

from dataclasses import dataclass, field

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
