"""What a model says about a split, scored by scikit-learn."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import Loader
from common.engine import processes
from common.engine.device import evaluating
from common.engine.records import ClassRecord, Evaluation


@torch.inference_mode()
def score(model: nn.Module, loader: Loader) -> tuple[float, float]:
    """Mean cross-entropy and top-1 of a split in float32, each image once, over all processes."""
    sums = torch.zeros(3, device=loader.device)  # loss, hits, images
    with evaluating(model):
        for x, y in loader.batches():
            logits = model(x)
            loss = F.cross_entropy(logits, y, reduction="sum")
            hits = (logits.argmax(1) == y).sum()
            sums += torch.stack((loss, hits.to(loss), torch.full_like(loss, len(y))))
    total, hits, images = processes.sum_over_processes(sums).tolist()
    return total / images, hits / images


@torch.inference_mode()
def predict(model: nn.Module, loader: Loader) -> tuple[Tensor, Tensor]:
    """Probabilities (N, K) and labels (N,) of every image of a split, in its order, on the CPU.

    Several processes share the work; each of them gets the whole answer.
    """
    rows = []
    with evaluating(model):
        for x, y in loader.batches():
            rows.append((model(x).softmax(1), y))
    mine = tuple(torch.cat(parts).cpu() for parts in zip(*rows)) if rows else None
    return processes.gather_rows(mine)


def evaluate(model: nn.Module, loader: Loader, class_names: list[str]) -> Evaluation:
    """Top-1, top-5, cross-entropy, and precision, recall and F1 of each class, in float32.

    Top-5 of five classes or fewer is 1.
    """
    from sklearn.metrics import log_loss, precision_recall_fscore_support, top_k_accuracy_score

    probabilities, labels = (t.numpy() for t in predict(model, loader))
    classes = np.arange(len(class_names))
    predicted = probabilities.argmax(1)
    scores = precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0.0)
    per_class = [
        ClassRecord(name, *(float(v) for v in values[:3]), support=int(values[3]))
        for name, *values in zip(class_names, *scores)
    ]
    top5 = 1.0
    if len(classes) > 5:
        top5 = float(top_k_accuracy_score(labels, probabilities, k=5, labels=classes))
    normalised = probabilities.astype(np.float64)
    normalised /= normalised.sum(1, keepdims=True)
    return Evaluation(
        loss=float(log_loss(labels, normalised, labels=classes)),
        top1=float((predicted == labels).mean()),
        top5=top5,
        targets=labels,
        probabilities=probabilities,
        per_class=per_class,
    )


def most_wrong(evaluation: Evaluation, count: int = 25) -> np.ndarray:
    """Rows of the wrong predictions, the most confident
    first: where the model is surest and mistaken.
    """
    wrong = np.flatnonzero(evaluation.predictions != evaluation.targets)
    confidence = evaluation.probabilities[wrong].max(axis=1)
    return wrong[np.argsort(-confidence, kind="stable")][:count]
