"""Scores against a hand count and against another path through the library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from common.config import TrainConfig
from common.data import Data, make_data
from common.engine.processes import gather_rows
from common.engine.records import Evaluation
from common.engine.sources import Pictures, Source
from common.evaluation import evaluate, most_wrong, score

CPU = torch.device("cpu")
LOGITS = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(40) % 8


class Recites(nn.Module):
    """The logits of the image whose number its first pixel holds; others in training mode."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.mean, self.std = data.mean[0], data.std[0]
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = (255 * (x[:, 0, 0, 0] * self.std + self.mean)).round().long()
        return LOGITS[rows] if not self.training else LOGITS[rows].flip(1)


@pytest.fixture(scope="module")
def data() -> Data:
    pixels = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    pixels[:, :, 0, 0] = torch.arange(40, dtype=torch.uint8).view(-1, 1)
    every = Pictures(LABELS, pixels)
    config = TrainConfig(batch_size=7, image_size=8, augment="none").resolve("digits")
    return make_data(Source("numbered", list("abcdefgh"), every, every, every), config, CPU)


def test_every_number_by_hand(data: Data) -> None:
    """In eval mode, whatever the mode before."""
    model = Recites(data).train()
    said = evaluate(model, data.test, data.class_names)
    order = LOGITS.argsort(dim=1, descending=True)
    ranks = (order == LABELS[:, None]).int().argmax(1)
    assert said.top1 == pytest.approx((ranks < 1).float().mean().item())
    assert said.top5 == pytest.approx((ranks < 5).float().mean().item())
    assert said.top5 > (ranks < 3).float().mean().item()
    expected = nn.functional.cross_entropy(LOGITS, LABELS).item()
    assert said.loss == pytest.approx(expected, rel=1e-5)
    assert score(model, data.test) == pytest.approx((expected, said.top1), rel=1e-5)
    guess = order[:, 0]
    for k, record in enumerate(said.per_class):
        right = int(((guess == k) & (k == LABELS)).sum())
        assert record.support == 5 and record.name == "abcdefgh"[k]
        assert record.recall == pytest.approx(right / 5)
        assert record.precision == pytest.approx(right / max(1, int((guess == k).sum())))
    assert any(r.recall != r.precision for r in said.per_class)
    assert model.training


def test_the_surest_mistakes_come_first() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]], np.float32)
    said = Evaluation(0, 0, 0, np.array([1, 1, 1, 0]), probabilities)
    assert most_wrong(said).tolist() == [0, 3, 1]
    assert most_wrong(said, 1).tolist() == [0]


def test_a_process_without_images_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images over seven processes: the last two have none."""
    parts = [(torch.tensor([r]), torch.tensor([[r, r]])) for r in range(5)] + [None, None]
    monkeypatch.setattr("common.engine.processes.from_all", lambda mine: parts)
    labels, rows = gather_rows(None)
    assert labels.tolist() == [0, 1, 2, 3, 4] and rows[:, 1].tolist() == [0, 1, 2, 3, 4]
