"""The loop and what it stands on: schedules,
parameter groups, sums, stops, memory that runs out.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from common import training
from common.config import TrainConfig
from common.data import Data, make_data
from common.engine.errors import Diverged, UserError
from common.engine.guard import Guard
from common.engine.meter import Meter, top1_hits
from common.engine.progress import Bar
from common.engine.sources import Pictures, Source
from common.evaluation import score
from common.runs import Run
from common.training import Schedule, fit, make_optimizer, make_schedule, parameter_groups
from common.transfer.images import PairLoader

CPU = torch.device("cpu")


def make_net(batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))


def colours(**settings: object) -> tuple[Data, TrainConfig]:
    """Noise whose brightest channel tells its class of three."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    pixels = torch.randint(0, 120, (90, 3, 8, 8), dtype=torch.uint8, generator=generator)
    pixels[torch.arange(90), labels] += 60
    every = Pictures(labels, pixels)
    source = Source("colours", ["r", "g", "b"], every, every.take(torch.arange(20)))
    defaults = {"batch_size": 9, "image_size": 8, "epochs": 2, "lr": 0.05, "device": "cpu"}
    config = TrainConfig(**{**defaults, **settings}).resolve("digits")
    return make_data(source, config, CPU), config


def train(net: nn.Module | None = None, **settings: object) -> tuple[nn.Module, list, dict]:
    data, config = colours(**settings)
    net = net or make_net()
    optimizer = make_optimizer(net, config)
    schedule = make_schedule(optimizer, config, data.train)
    losses: list[torch.Tensor] = []
    history = fit(
        net, data, nn.CrossEntropyLoss(), optimizer, schedule, config, on_step=losses.append
    )
    return net, history, losses


def test_the_loop_fits_on_one_screen() -> None:
    body = inspect.getsource(training.train_one_epoch).split('"""')[-1].strip().splitlines()
    assert len(body) <= 30


def test_first_steps_are_those_of_a_loop_written_by_hand() -> None:
    """Plain SGD, spelled out, on the same batches: the same weights."""
    net, _, losses = train(schedule="constant", warmup=0.0, epochs=1)
    data, config = colours(schedule="constant", warmup=0.0, epochs=1)
    twin, momentum, expected = make_net(), {}, []
    for x, y in data.train.batches(0):
        loss = nn.functional.cross_entropy(twin(x), y)
        expected.append(loss.item())
        twin.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                g = p.grad + (config.weight_decay * p if p.dim() > 1 else 0)
                momentum[name] = momentum.get(name, 0) * config.momentum + g
                p -= config.lr * (g + config.momentum * momentum[name])
    assert torch.stack(losses).tolist() == pytest.approx(expected, rel=1e-5)
    for a, b in zip(net.parameters(), twin.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_two_half_batches_accumulated_are_one_whole() -> None:
    whole, _, _ = train(batch_size=18, epochs=1)
    halves, _, _ = train(batch_size=9, accumulate=2, epochs=1)
    for a, b in zip(whole.parameters(), halves.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_training_record_counts_every_image_once() -> None:
    _, history, _ = train(epochs=3)
    assert [r.epoch for r in history] == [1, 2, 3]
    assert history[-1].train_top1 > 0.8
    assert all(0 <= r.val_top1 <= 1 for r in history)


def test_norms_and_biases_have_no_weight_decay() -> None:
    decayed, free = parameter_groups(make_net(batch_norm=True), 0.1)
    assert [p.dim() for p in decayed["params"]] == [4, 2] and decayed["weight_decay"] == 0.1
    assert [p.dim() for p in free["params"]] == [1, 1, 1, 1] and free["weight_decay"] == 0
    frozen = make_net()
    frozen[0].requires_grad_(False)
    assert sum(len(g["params"]) for g in parameter_groups(frozen, 0.1)) == 2


def optimizer_of(lr: float = 0.4) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rates(kind: str, steps: int, warmup: int = 0) -> list[float]:
    optimizer = optimizer_of()
    schedule = Schedule(optimizer, kind, steps, warmup)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    return out


def test_cosine_is_torchs() -> None:
    optimizer = optimizer_of()
    reference = CosineAnnealingLR(optimizer, 20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates("cosine", 20) == pytest.approx(expected)


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    assert rates("cosine", 20, 4)[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_step_onecycle_and_constant() -> None:
    assert rates("step", 8) == pytest.approx([0.4] * 4 + [0.04] * 2 + [0.004] * 2)
    assert rates("constant", 3) == [0.4] * 3
    cycle = rates("onecycle", 100)
    assert cycle[0] == pytest.approx(0.4 / 25) and cycle[30] == pytest.approx(0.4)
    assert cycle[-1] < 0.001 and cycle == sorted(cycle[:30]) + sorted(cycle[30:], reverse=True)


def test_plateau_is_torchs() -> None:
    losses = [3, 2, 2.1, 2.2, 2.3, 2.4, 2.5, 1, 1.1, 1.2, 1.3, 1.4, 1.5]
    ours, theirs = optimizer_of(), optimizer_of()
    schedule = Schedule(ours, "plateau", 100)
    reference = ReduceLROnPlateau(theirs, factor=0.1, patience=3, threshold=0)
    for loss in losses:
        schedule.epoch_end(loss)
        reference.step(loss)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
    assert ours.param_groups[0]["lr"] < 0.4


def test_each_group_keeps_its_own_peak() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.01)]
    optimizer = torch.optim.SGD(groups)
    schedule = Schedule(optimizer, "cosine", 10)
    for _ in range(5):
        schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.005])


def test_learning_rate_follows_the_images_per_step() -> None:
    small = TrainConfig(batch_size=64).resolve("cifar10")
    large = TrainConfig(batch_size=64, accumulate=4).resolve("cifar10", world_size=2)
    assert large.lr == pytest.approx(8 * small.lr)
    assert TrainConfig(lr=0.3, batch_size=64).resolve("cifar10").lr == 0.3


def test_average_of_the_weights_is_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    decay = 0.5
    data, config = colours(ema=decay, epochs=1)
    net = make_net(batch_norm=True)
    expected = [p.detach().clone() for p in net.parameters()]
    optimizer = make_optimizer(net, config)
    schedule = make_schedule(optimizer, config, data.train)
    step = schedule.step

    def spy() -> None:
        step()
        d = min(decay, (1 + schedule.taken) / (10 + schedule.taken))
        expected[:] = [d * e + (1 - d) * p for e, p in zip(expected, net.parameters())]

    schedule.step = spy
    scored = []
    monkeypatch.setattr(
        training,
        "score",
        lambda model, *a: scored.append([p.clone() for p in model.parameters()]) or (1.0, 0.5),
    )
    fit(net, data, nn.CrossEntropyLoss(), optimizer, schedule, config)
    for a, b in zip(scored[0], expected):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_short_run_is_not_tested_with_the_weights_of_its_start() -> None:
    """300 steps are nothing to a decay of 0.9999; the warm-up of the average makes up for it."""
    _, raw, _ = train(epochs=30)
    _, averaged, _ = train(epochs=30, ema=0.9999)
    assert averaged[-1].val_top1 >= raw[-1].val_top1 - 0.05 > 0.8


def test_early_stopping_waits_for_patience() -> None:
    _, history, _ = train(epochs=30, lr=1e-9, patience=2, schedule="constant")
    losses = [r.val_loss for r in history]
    assert len(history) < 30 and len(history) - 1 - losses.index(min(losses)) == 2


class Poison(nn.CrossEntropyLoss):
    """Not a number at the fourth batch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(logits, y) * (math.nan if self.calls == 4 else 1)


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    data, config = colours()
    net = make_net()
    optimizer = make_optimizer(net, config)
    schedule = make_schedule(optimizer, config, data.train)
    with pytest.raises(Diverged, match=r"epoch 1, step 4, learning rate .* try --lr"):
        fit(net, data, Poison(), optimizer, schedule, config)
    assert all(p.isfinite().all() for p in net.parameters())
    assert schedule.taken == 3


def test_what_was_validated_is_what_is_left() -> None:
    """Also without a run's folder: the average where there is one, so that a rate that is chosen by
    it is a rate for what is tested.
    """
    data, _ = colours(ema=0.9)
    net, history, _ = train(ema=0.9)
    assert score(net, data.val)[0] == pytest.approx(history[-1].val_loss)


def test_seconds_of_an_epoch_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """... where it is saved at its end, or memory ran out on the way."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("common.engine.meter.time.monotonic", lambda: next(clock))
    meter, bar = Meter(CPU, epochs=3), Bar(0, "", show=False)
    meter.begin_epoch(bar)
    meter.rewind()
    meter.begin_epoch(bar)
    assert meter.elapsed() == 20  # ten before the batch that failed
    meter.end_epoch()
    assert meter.state_dict()["seconds"] == 10  # of the next, on the clock that ticks by ten


def test_a_last_step_that_is_not_finite_is_seen_though_the_host_lags() -> None:
    """On a GPU the number on its way may be an earlier step's."""
    guard, net = Guard(CPU, clip=0.0, amp=None), make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    guard.finite.push = lambda number, at=0: None  # nothing has come yet
    sum(p.sum() for p in net.parameters()).backward()
    guard.check(torch.tensor(math.nan), optimizer, epoch=1, step=9)
    with pytest.raises(Diverged):
        guard.settle(val_loss=0.5)


def test_clip_limits_the_gradient() -> None:
    free, _, _ = train(epochs=1)
    held, _, _ = train(epochs=1, clip=1e-6, weight_decay=0.0)
    start = make_net()
    moved = sum((a - b).norm() for a, b in zip(start.parameters(), free.parameters()))
    barely = sum((a - b).norm() for a, b in zip(start.parameters(), held.parameters()))
    assert barely < 1e-3 * moved


class Hungry(nn.Module):
    """Runs out of memory, as CUDA would, for batches
    of more than `limit` images, after `after` passes.
    """

    def __init__(self, limit: int, after: int) -> None:
        super().__init__()
        self.net, self.limit, self.left = make_net(), limit, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.training and len(x) > self.limit and self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.net(x)


def test_out_of_memory_halves_the_batch_and_keeps_the_step(
    capsys: pytest.CaptureFixture,
) -> None:
    plain, _, _ = train(batch_size=16, epochs=1)
    hungry, history, _ = train(Hungry(limit=8, after=2), batch_size=16, epochs=1)
    assert "--batch-size 8 --accumulate 2, the same images per step" in capsys.readouterr().out
    for a, b in zip(plain.parameters(), hungry.net.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    assert history[0].train_loss > 0


def test_out_of_memory_is_one_line_when_asked_to_stop() -> None:
    with pytest.raises(UserError, match="out of memory with 16 images a batch"):
        train(Hungry(limit=8, after=2), batch_size=16, auto_batch=False)


def test_out_of_memory_with_pairs_halves_both_sides(capsys: pytest.CaptureFixture) -> None:
    """Lesson 8's batches of source and target images: the same images in every step."""
    seen = []
    for limit in (100, 20):
        data, config = colours(batch_size=16, epochs=1)
        other, _ = colours(batch_size=16, seed=1)
        pairs = dataclasses.replace(data, train=PairLoader(data.train, other.train))
        hungry = SourceOnly(limit=limit, after=0)
        optimizer = make_optimizer(hungry, config)
        schedule = make_schedule(optimizer, config, pairs.train)
        fit(hungry, pairs, nn.CrossEntropyLoss(), optimizer, schedule, config)
        seen.append(schedule.taken)
    assert "--batch-size 8 --accumulate 2" in capsys.readouterr().out
    assert seen == [5, 5]


class SourceOnly(Hungry):
    """The logits of the first half of a batch, which alone has labels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return logits[: len(x) // 2] if self.training else logits


def test_an_optimizer_that_is_not_fused_is_not_told_to_skip() -> None:
    """AdamW and unfused SGD refuse `found_inf`; where they are used the guard waits instead."""
    for fused in (True, False):
        parameter = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
        guard = Guard(CPU, clip=0, amp=None)
        guard.finite.asynchronous, guard.finite.push = True, lambda number, at: None  # as on a GPU
        guard.finite.take = lambda guard=guard: setattr(guard.finite, "value", float(guard.failed))
        parameter.grad = torch.tensor([math.nan, 1.0])
        if fused:
            guard.check(torch.tensor(1.0), optimizer, 1, 1)
            optimizer.step()
            assert parameter.tolist() == [1, 1], "skipped"
        else:
            assert not hasattr(optimizer, "found_inf")
            with pytest.raises(Diverged, match="epoch 1"):
                guard.check(torch.tensor(1.0), optimizer, 1, 1)


def test_weights_that_are_not_finite_after_the_last_step_are_not_tested() -> None:
    """The gradient of the last step is finite, the weights that it makes are not."""
    data, config = colours(epochs=1, batch_size=81, schedule="constant", warmup=0.0)
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=3e38)
    schedule = make_schedule(optimizer, config, data.train)
    with pytest.raises(Diverged, match="no longer finite"):
        fit(net, data, nn.CrossEntropyLoss(), optimizer, schedule, config)
    assert schedule.taken == 1


def test_a_run_begun_without_a_scaler_goes_on_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a CPU to a chip that has float16 only."""
    data, config = colours(epochs=1, run_dir=str(tmp_path))

    def begin(config: TrainConfig) -> list:
        net = make_net()
        optimizer = make_optimizer(net, config)
        schedule = make_schedule(optimizer, config, data.train)
        run = Run.open(config, "here")
        return fit(net, data, nn.CrossEntropyLoss(), optimizer, schedule, config, run)

    assert len(begin(config)) == 1
    (folder,) = (tmp_path / "here").iterdir()
    monkeypatch.setattr(training, "amp_dtype", lambda *_: torch.float16)
    assert len(begin(dataclasses.replace(config, resume=str(folder)))) == 1


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_best_epoch_is_kept_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float
) -> None:
    """Of three epochs the second validates best: its weights, averaged or not, are what is left."""
    data, config = colours(epochs=3, run_dir=str(tmp_path), ema=ema)
    said, weights = iter([(0.9, 0.5), (0.5, 0.9), (0.4, 0.6)]), []

    def scripted(model: nn.Module, loader: object) -> tuple[float, float]:
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(said)

    monkeypatch.setattr(training, "score", scripted)
    net = make_net(batch_norm=True)
    optimizer = make_optimizer(net, config)
    schedule = make_schedule(optimizer, config, data.train)
    run = Run.open(config, "here")
    fit(net, data, nn.CrossEntropyLoss(), optimizer, schedule, config, run)
    kept = run.load_best()
    assert kept["best"] == {"top1": 0.9, "loss": 0.5, "epoch": 2}
    for state in (kept["model"], net.state_dict()):
        assert all(torch.equal(state[name], value) for name, value in weights[1].items())
    assert not torch.equal(weights[1]["0.weight"], weights[2]["0.weight"])


def test_the_limit_of_the_gradient_is_of_the_gradient_unscaled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, _, _ = train(epochs=1, clip=0.1, weight_decay=0.0)
    monkeypatch.setattr(training, "amp_dtype", lambda *_: torch.float16)
    scaled, _, _ = train(epochs=1, clip=0.1, weight_decay=0.0)
    start = make_net()
    moves = [
        torch.cat([(a - b).flatten() for a, b in zip(net.parameters(), start.parameters())])
        for net in (plain, scaled)
    ]
    assert (moves[0] - moves[1]).norm() < 0.05 * moves[0].norm()


def test_a_short_run_is_not_all_warm_up() -> None:
    assert TrainConfig(epochs=1).resolve("digits").warmup == pytest.approx(0.2)
    assert TrainConfig(epochs=100).resolve("digits").warmup == 2
    assert TrainConfig(epochs=1, warmup=1.0).resolve("digits").warmup == 1


def test_the_rate_of_an_epoch_is_that_of_its_last_step() -> None:
    _, history, _ = train(epochs=2, lr=0.1, schedule="linear", warmup=0.0)
    assert [r.lr for r in history] == pytest.approx([0.1 * 10 / 18, 0.1 / 18])


def test_scoring_leaves_frozen_norms_frozen() -> None:
    data, _ = colours()
    net = make_net(batch_norm=True).train()
    net[1].eval()
    score(net, data.val)
    assert net.training and not net[1].training


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_only_matrices_decay_in_either_optimizer(name: str) -> None:
    config = TrainConfig(optimizer=name).resolve("digits")
    groups = make_optimizer(make_net(batch_norm=True), config).param_groups
    decays = {p.dim(): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {4: config.weight_decay, 2: config.weight_decay, 1: 0}


def test_top1_reads_tuples_and_mixed_labels() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert top1_hits((logits, None), torch.tensor([0, 0, 0])) == 2
    soft = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.1, 0.9]])
    assert top1_hits(logits, soft) == 2


def test_smoke_is_two_batches_of_everything() -> None:
    data, config = colours(smoke=True, epochs=50)
    assert config.epochs == 1 and len(data.train) == 2 and len(list(data.test.batches())) == 2


@pytest.mark.parametrize(
    "setting", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": -1.0}, {"augment": "wild"}]
)
def test_config_refuses_nonsense(setting: dict) -> None:
    with pytest.raises(UserError):
        TrainConfig(**setting)


def test_recipes_fill_only_what_was_left_open() -> None:
    config = TrainConfig(epochs=3).resolve("imagenet")
    assert (config.epochs, config.image_size, config.label_smoothing) == (3, 224, 0.1)
    assert not [
        f.name
        for f in dataclasses.fields(config)
        if getattr(config, f.name) is None and f.name not in ("workers", "seeds")
    ]
