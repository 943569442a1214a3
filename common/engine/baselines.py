"""What a result has to be ahead of to mean anything."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from common.data import Data, ImageLoader


def baselines(data: Data, most: int = 5000, side: int = 16) -> dict[str, float]:
    """Test accuracies of what has learned no features: a guess, the commonest class, and logistic
    regression on the pixels (of at most `most` training images, at most `side` pixels wide).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def pixels(loader: ImageLoader, rows: np.ndarray) -> np.ndarray:
        parts = []
        for i in range(0, len(rows), 256):
            x = loader.take(rows[i : i + 256]).float()
            if x.shape[-1] > side:
                x = F.interpolate(x, size=(side, side), mode="area")
            parts.append(x.flatten(1).cpu())
        return torch.cat(parts).numpy()

    rows = np.random.default_rng(0).permutation(len(data.train.labels))[:most]
    train, test = (loader.labels.numpy() for loader in (data.train, data.test))
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        linear.fit(pixels(data.train, rows), train[rows])
    right = linear.predict(pixels(data.test, np.arange(len(test)))) == test
    return {
        "chance": 1 / data.num_classes,
        "majority": float((test == np.bincount(train).argmax()).mean()),
        "logistic_regression": float(right.mean()),
    }
