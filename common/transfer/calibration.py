"""How sure a model is: a temperature and a threshold, both set on validation images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from common.data import Loader
from common.engine.errors import UserError
from common.engine.files import write_json
from common.evaluation import predict

FILE = "calibration.json"
WANTED = 0.95  # of the answers that are not "unsure", the share that is to be right


@dataclass(frozen=True)
class Calibration:
    """Probabilities are softmax(logits / temperature). An answer below `threshold` is unsure."""

    temperature: float = 1.0
    # None: no validation images are at hand; above 1: the model is never sure enough.
    threshold: float | None = None
    answered: float | None = None  # share of the validation images at or above the threshold
    right: float | None = None  # share of these that are right
    images: int = 0  # for validation

    def save(self, folder: Path) -> None:
        write_json(folder / FILE, self)

    @classmethod
    def load(cls, folder: Path | None) -> Calibration:
        """That of a run folder; the untouched softmax where it has none."""
        if folder is None or not (path := folder / FILE).is_file():
            return UNKNOWN
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} can't be read ({error}): remove it") from None


UNKNOWN = Calibration()


@dataclass(frozen=True)
class Trained:
    """A trained model with what it takes to use it."""

    model: nn.Module
    class_names: Sequence[str]  # in the order of its logits
    mean_std: tuple[Tensor, Tensor]  # (3,) each, of pixels in [0, 1]: its inputs' normalisation
    side: int  # in pixels, of its inputs
    calibration: Calibration = UNKNOWN


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


def threshold_of(confidence: np.ndarray, right: np.ndarray) -> float:
    """The lowest probability from which on a share WANTED of the answers is right; 1.01 if none.

    >>> threshold_of(np.array([0.9, 0.8, 0.6]), np.array([True, True, False]))
    0.8
    """
    from sklearn.metrics import precision_recall_curve

    if not right.any():
        return 1.01
    shares, _, thresholds = precision_recall_curve(right, confidence)
    enough = thresholds[shares[:-1] >= WANTED]
    return float(enough[0]) if len(enough) else 1.01


def calibrate(model: nn.Module, loader: Loader) -> Calibration:
    """On images that the weights were not trained with."""
    from scipy.special import softmax

    probabilities, labels = (t.numpy() for t in predict(model, loader))
    log_p = np.log(probabilities.astype(float).clip(1e-30))
    temperature = temperature_of(log_p, labels)
    scaled = softmax(log_p / temperature, axis=1)
    confidence, right = scaled.max(1), scaled.argmax(1) == labels
    threshold = threshold_of(confidence, right)
    sure = confidence >= threshold
    share = float(right[sure].mean()) if sure.any() else None
    return Calibration(temperature, threshold, float(sure.mean()), share, len(labels))
