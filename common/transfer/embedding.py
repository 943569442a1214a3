"""Features of many images as points in the plane: t-SNE where they are few, PCA where many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from common import plotting

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

MOST = 2000  # images drawn; t-SNE takes some 10 s for so many


def embed(features: np.ndarray, seed: int = 0) -> tuple[np.ndarray, str]:
    """(N, D) -> (N, 2) and the name of the method: t-SNE from 30 points on, PCA below."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    features = np.asarray(features, dtype=np.float64)
    if min(features.shape) < 2:  # one test image
        return np.zeros((len(features), 2)), "PCA"
    if len(features) < 30:
        return PCA(2, random_state=seed).fit_transform(features), "PCA"
    # Above 50 dimensions the distances are mostly noise: van der Maaten and Hinton 2008, sec. 4.2.
    reduced = PCA(min(50, *features.shape), random_state=seed).fit_transform(features)
    perplexity = min(30.0, len(features) / 4)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return tsne.fit_transform(reduced), "t-SNE"


def feature_map(
    views: Mapping[str, np.ndarray | Tensor],
    labels: np.ndarray,
    class_names: Sequence[str],
    seed: int = 0,
) -> Figure:
    """One panel per view: its features, (N, D), as points in the colour of their class.

    Above 2,000 images a random sample is drawn; above 10 classes their first 10.
    """
    chosen = np.flatnonzero(labels < 10)
    if len(chosen) > MOST:
        chosen = np.random.default_rng(seed).choice(chosen, MOST, replace=False)
    labels = labels[chosen]
    figure, axes = plotting.panels(len(views), "What the classifier sees of the test images")
    for ax, (name, features) in zip(axes, views.items()):
        points, method = embed(np.asarray(torch.as_tensor(features).cpu())[chosen], seed)
        for c in np.unique(labels):
            mine = points[labels == c]
            color = plotting.PALETTE[c % len(plotting.PALETTE)]
            marker = "o^s"[c // len(plotting.PALETTE)]
            ax.scatter(*mine.T, s=14, color=color, marker=marker, alpha=0.7, label=class_names[c])
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{name} the transfer ({method})", size=plotting.TITLE_SIZE, loc="left")
    legend = axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder's name may have a $ in it
    return figure
