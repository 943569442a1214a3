"""--find-lr and --track: what they write, and one line where they can't."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from common import find_lr as find_lr_module
from common.config import TrainConfig
from common.find_lr import HIGHEST, LOWEST, find_lr
from common.resnet9 import ResNet9


def test_the_range_test_finds_where_gradient_descent_diverges(tmp_path: Path) -> None:
    """A linear layer on the images: the rate at which SGD diverges is known from the Hessian, up to
    the noise of batches.
    """
    torch.manual_seed(0)
    config = TrainConfig(
        model="linear", dataset="digits", momentum=0.0, augment="none", run_dir=str(tmp_path)
    )

    def build(_: TrainConfig, num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))

    found = find_lr(config, build)
    rates, losses = found["rates"], found["losses"]
    assert rates[0] == pytest.approx(LOWEST) and len(rates) == len(losses)
    assert rates[1] / rates[0] == pytest.approx((HIGHEST / LOWEST) ** (1 / 119))
    # Softmax's Hessian is at most x x^T / 2 in each class; 192 normalised pixels: 2 / (192 / 2).
    lowest = rates[losses.index(min(losses))]
    assert 0.2 * 2 / 96 < lowest < 50 * 2 / 96
    assert min(losses) < 0.7 * losses[0] and math.isclose(losses[0], math.log(10), rel_tol=0.3)
    (folder,) = (tmp_path).glob("*/find-lr-digits-s0-*")
    assert (folder / "find_lr.png").exists() and (folder / "report.html").exists()


def test_groups_keep_their_shares_and_measured_layers_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is tried is the net and the optimizer of the run: Muon's groups differ in rates."""
    made = []
    make = find_lr_module.make_optimizer

    def noted(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        made.extend([model, make(model, config)])
        return made[1]

    monkeypatch.setattr(find_lr_module, "make_optimizer", noted)
    config = TrainConfig(model="resnet9", dataset="digits", recipe="fast", run_dir=str(tmp_path))
    found = find_lr(config, lambda _, n: ResNet9((8, 8, 8), num_classes=n))
    net, optimizer = made
    last = found["rates"][-1]
    assert [g["lr"] / last for g in optimizer.param_groups] == pytest.approx([1, 1 / 40, 1 / 5])
    filters = net.stem[0].weight.flatten(1)
    assert torch.equal(filters[:12], -filters[12:])  # measured: each direction and its negative


def test_a_step_is_that_of_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same images in batches of a quarter, and the gradient's limit."""
    monkeypatch.setattr(find_lr_module, "STEPS", 12)
    monkeypatch.setattr(find_lr_module, "conclude", lambda *parts, **more: {})
    monkeypatch.setattr(find_lr_module.Run, "figure", lambda *parts: None)

    def weight(**settings: float) -> torch.Tensor:
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        nn.init.zeros_(net[1].weight)
        nn.init.zeros_(net[1].bias)
        shared = {"model": "linear", "dataset": "digits", "augment": "none"}
        find_lr(TrainConfig(run_dir=str(tmp_path), **shared, **settings), lambda *_: net)
        return net[1].weight.detach()

    whole = weight(batch_size=64)
    torch.testing.assert_close(weight(batch_size=16, accumulate=4), whole)
    assert weight(batch_size=64, clip=1e-3).norm() < 0.1 * whole.norm()


def test_find_lr_from_the_command_line(cli: Callable, tmp_path: Path) -> None:
    code, out, err = cli("01", "--find-lr", "--model", "resnet20", "--dataset", "digits")
    assert code == 0, err
    assert "sound peak" in out
    (outcome,) = (tmp_path / "runs").glob("*/find-lr-*/experiment.json")
    assert len(json.loads(outcome.read_text())["losses"]) > 20


def test_epochs_are_tracked(cli: Callable, tmp_path: Path, no_figures: None) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = ["--model", "resnet20", "--dataset", "digits", "--smoke", "--track", "tensorboard"]
    code, _, err = cli("01", *argv)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").glob("*/resnet20-*")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    with (folder / "history.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in ("train_loss", "val_top1", "lr"):
        values = [(event.step, event.value) for event in events.Scalars(name)]
        assert values == [(int(r["epoch"]), pytest.approx(float(r[name]))) for r in rows]


def test_without_the_package_one_line_before_the_run(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    code, _, err = cli("01", "--dataset", "digits", "--track", "tensorboard")
    assert code == 2 and err.count("\n") == 1 and "pip install tensorboard" in err
    assert not (tmp_path / "runs").exists()
