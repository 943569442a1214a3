"""The benchmarks run, and say what they do; what they measure is no test's business."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from common.engine.device import keep_freed_memory
from tests import bench


def test_every_benchmark_of_the_loop_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--model resnet20 --image-size 8 --steps 1 --rounds 2 --batch-size 4 --workers 0"
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", f"bench input parts epoch utilisation {small}".split())
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
        keep_freed_memory(False)
    out = capsys.readouterr().out
    assert "epoch: 1 training steps of 4 images" in out and "round 2 of 2" in out
    assert "training, resnet20" in out and "utilisation" in out and "optimizer" in out


def test_the_race_to_an_accuracy_tells_seconds_and_multiply_adds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "accuracy --targets 0.01 1.01 --sides plain:resnet9@1 resnet9@1 --workers 0"
    monkeypatch.setattr(sys, "argv", ["bench", *flags.split()])
    bench.main()
    table = capsys.readouterr().out.splitlines()[-2:]
    for line, side in zip(table, ("plain", "ours")):
        assert line.startswith(f"{side} resnet9, 1 epochs") and " 4.7 " in line
        assert " s (1)" in line and "not reached" in line


def test_the_plain_side_of_a_race_has_the_cosine_that_everyone_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its rate was once that of each epoch's end, and so nothing in the last."""
    rates: list[float] = []

    def look(
        model: nn.Module, batches: object, optimizer: torch.optim.Optimizer, *_: object
    ) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()  # without gradients: nothing moves, and the schedule sees a step

    monkeypatch.setattr(bench, "plain_epoch", look)
    flags = "accuracy --sides plain:resnet9@4 --workers 0"
    monkeypatch.setattr(sys, "argv", ["bench", *flags.split()])
    bench.main()
    cosine = [(1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates == pytest.approx([rates[0] * share for share in cosine]) and rates[0] > 0
