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
    regression on the pixels (of at most `most` images to learn and `most` to test, at most `side`
    pixels wide, so that large data take seconds too).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    def pixels(loader: ImageLoader, rows: np.ndarray) -> np.ndarray:
        parts = []
        for i in range(0, len(rows), 256):
            x = loader.take(rows[i : i + 256]).float()
            if x.shape[-1] > side:
                x = F.interpolate(x, size=(side, side), mode="area")
            parts.append(x.flatten(1).cpu())
        return torch.cat(parts).numpy()

    generator = np.random.default_rng(0)
    train, test = (loader.labels.numpy() for loader in (data.train, data.test))
    rows, tested = (generator.permutation(len(labels))[:most] for labels in (train, test))
    found = {
        "chance": 1 / data.num_classes,
        "majority": float((test == np.bincount(train).argmax()).mean()),
    }
    if len(np.unique(train[rows])) < 2:  # a rare class that none of so many drawn images is of
        return found
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    # One thread: on a busy machine several wait for each other longer than they compute.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        linear.fit(pixels(data.train, rows), train[rows])
        right = linear.predict(pixels(data.test, tested)) == test[tested]
    return {**found, "logistic_regression": float(right.mean())}
