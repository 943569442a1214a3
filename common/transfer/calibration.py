"""How sure a model is: a temperature and a threshold, both set on validation images."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import nn

from common.data import Loader
from common.engine.errors import UserError
from common.engine.files import write_json
from common.evaluation import predict

FILE = "calibration.json"
WANTED = 0.95  # of the answers that are not "unsure", the share that is to be right


@dataclass(frozen=True)
class Calibration:
    """Probabilities are softmax(logits / temperature). An answer below `threshold` is unsure.

    Attributes:
        threshold: None where no validation images are at hand; above 1 where the model is never
            sure enough.
        answered: share of the validation images that are at or above the threshold.
        right: share of these that are right.
        images: how many validation images there were.
    """

    temperature: float = 1.0
    threshold: float | None = None
    answered: float | None = None
    right: float | None = None
    images: int = 0

    def save(self, folder: Path) -> None:
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path | None) -> Calibration:
        """That of a run folder; the untouched softmax where it has none."""
        path = Path(folder or "") / FILE
        if folder is None or not path.is_file():
            return UNKNOWN
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} can't be read ({error}): remove it") from None


UNKNOWN = Calibration()


def temperature_of(log_p: np.ndarray, labels: np.ndarray) -> float:
    """The temperature under which the labels are likeliest.  Guo et al. 2017, sec. 4.2

    Args:
        log_p: (N, K) logits, or log probabilities, which are the same up to a constant.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows = np.arange(len(labels))

    def loss(log_t: float) -> float:
        return -float(log_softmax(log_p / np.exp(log_t), axis=1)[rows, labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def threshold_of(confidence: np.ndarray, right: np.ndarray, wanted: float = WANTED) -> float:
    """The lowest probability from which on a share `wanted` of the answers is right; 1.01 if none.

    >>> threshold_of(np.array([0.9, 0.8, 0.6]), np.array([True, True, False]))
    0.8
    """
    order = np.argsort(-confidence, kind="stable")
    shares = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    sorted_ = confidence[order]
    last = np.append(sorted_[1:] != sorted_[:-1], True)  # equal probabilities go together
    enough = np.flatnonzero((shares >= wanted) & last)
    return float(sorted_[enough[-1]]) if len(enough) else 1.01


def calibrate(model: nn.Module, loader: Loader) -> Calibration:
    """On images that the weights were not trained with."""
    from scipy.special import softmax

    probabilities, labels = (t.double().numpy() for t in predict(model, loader))
    labels = labels.astype(int)
    log_p = np.log(probabilities.clip(1e-30))
    temperature = temperature_of(log_p, labels)
    scaled = softmax(log_p / temperature, axis=1)
    confidence, right = scaled.max(1), scaled.argmax(1) == labels
    threshold = threshold_of(confidence, right)
    sure = confidence >= threshold
    share = float(right[sure].mean()) if sure.any() else None
    return Calibration(temperature, threshold, float(sure.mean()), share, len(labels))
