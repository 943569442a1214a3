"""Lesson 6: hand counts, what dense connection means, checkpointing that changes no number, and the
experiments in miniature.
"""

from __future__ import annotations

import doctest
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.profiling import count_macs, count_parameters
from tests.conftest import lesson
from tests.parity import PUBLISHED, assert_is_torchvisions

densenet = lesson("06")
MODELS = densenet.MODELS


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name](**options)


def test_doctests() -> None:
    failed, attempted = doctest.testmod(densenet)
    assert attempted >= 8 and failed == 0


# Against the paper's tables and a hand count


@pytest.mark.parametrize("name", [name for name in MODELS if name in PUBLISHED])
def test_torchvision_and_the_published_table_agree(name: str) -> None:
    assert_is_torchvisions(on_meta(name), name)


def hand_count(
    n: int, k: int, bottleneck: bool, compression: float, stem: int, classes: int
) -> int:
    """Parameters of a CIFAR DenseNet, written down from section 3 without a module in sight."""
    total, channels = 3 * 3 * 3 * stem, stem
    for block in range(3):
        for _ in range(n):
            total += 2 * channels  # the norm's scale and shift
            if bottleneck:
                total += channels * 4 * k + 2 * 4 * k + 3 * 3 * 4 * k * k
            else:
                total += 3 * 3 * channels * k
            channels += k
        if block < 2:
            kept = int(channels * compression)
            total += 2 * channels + channels * kept
            channels = kept
    return total + 2 * channels + channels * classes + classes


def test_cifar_forms_have_the_papers_parameters() -> None:
    plain = count_parameters(on_meta("densenet40_k12", num_classes=10))
    assert plain == hand_count(12, 12, False, 1.0, stem=16, classes=10)
    assert plain / 1e6 == pytest.approx(1.0, abs=0.05)  # table 2
    bc = count_parameters(on_meta("densenet_bc100_k12", num_classes=10))
    assert bc == hand_count(16, 12, True, 0.5, stem=24, classes=10)
    assert bc / 1e6 == pytest.approx(0.8, abs=0.05)  # table 2


@pytest.mark.parametrize(
    ("depth", "growth_rate", "options", "millions"),
    [  # Huang et al. 2017, table 2, all of its DenseNets
        (40, 12, {}, 1.0),
        (100, 12, {}, 7.0),
        (100, 24, {}, 27.2),
        (100, 12, {"bottleneck": True, "compression": 0.5}, 0.8),
        (250, 24, {"bottleneck": True, "compression": 0.5}, 15.3),
        (190, 40, {"bottleneck": True, "compression": 0.5}, 25.6),
    ],
)
def test_table_2(depth: int, growth_rate: int, options: dict, millions: float) -> None:
    with torch.device("meta"):
        model = densenet.cifar_densenet(depth, growth_rate, num_classes=10, **options)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_the_number_in_a_name_counts_the_layers_with_weights(name: str) -> None:
    model = on_meta(name)
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert layers == int("".join(c for c in name.split("_k")[0] if c.isdigit()))


@pytest.mark.parametrize(("depth", "bottleneck"), [(41, False), (4, False), (40 + 3, True)])
def test_a_depth_that_does_not_divide_is_refused(depth: int, bottleneck: bool) -> None:
    with pytest.raises(ValueError, match=f"not {depth}"):
        densenet.cifar_densenet(depth, bottleneck=bottleneck)


# What dense connection means


def test_every_layer_reads_every_earlier_map_of_its_block() -> None:
    block = densenet.DenseBlock(8, depth=4, growth_rate=4)
    seen: list[int] = []
    for layer in block.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    block(torch.randn(2, 8, 4, 4))
    assert seen == [1, 2, 3, 4]
    assert [layer.conv1.in_channels for layer in block.layers] == [8, 12, 16, 20]
    assert sum(seen) == 4 * 5 // 2  # L(L+1)/2 direct connections: the paper's abstract


def test_without_dense_connections_a_layer_reads_its_neighbour_alone() -> None:
    block = densenet.DenseBlock(8, depth=4, growth_rate=4, dense=False)
    assert [layer.conv1.in_channels for layer in block.layers] == [8, 4, 4, 4]
    assert block(torch.randn(2, 8, 4, 4)).shape == (2, 4, 4, 4)


def test_small_form_starts_with_a_bare_convolution() -> None:
    """The stem of the paper's CIFAR nets: 16 channels, in a DenseNet-BC twice the growth rate."""
    widths = {"densenet40_k12": 16, "densenet_bc100_k12": 24, "densenet121": 64}
    for name, width in widths.items():
        stem = on_meta(name, small_input=True).stem
        assert [type(m) for m in stem] == [nn.Conv2d]
        assert stem[0].out_channels == width and stem[0].stride == (1, 1)


def test_growth_rate_is_an_option_of_every_model() -> None:
    for name in MODELS:
        model = on_meta(name, growth_rate=8)
        layers = [m for m in model.modules() if isinstance(m, densenet.DenseLayer)]
        assert {layer.conv1.out_channels for layer in layers} <= {8, 4 * 8}


def test_dropout_zeroes_new_maps_in_training_alone() -> None:
    layer = densenet.DenseLayer(8, growth_rate=64, dropout=0.5)
    features = [torch.randn(2, 8, 4, 4)]
    share = (layer.train()(features) == 0).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.1)
    assert (layer.eval()(features) == 0).sum() == 0


# Checkpointing: less memory, the same numbers


def trained_one_step(
    checkpointing: bool, dropout: float = 0.0, backend: str = "", **options: object
) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = densenet.cifar_densenet(
        16, growth_rate=4, num_classes=10, checkpointing=checkpointing, dropout=dropout, **options
    )
    x, labels = torch.randn(6, 3, 8, 8) + 1, torch.arange(6)
    torch.manual_seed(1)
    logits = (torch.compile(model, backend=backend) if backend else model)(x)
    F.cross_entropy(logits, labels).backward()
    return model, logits.detach()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_checkpointing_changes_no_number(bottleneck: bool, dropout: float) -> None:
    plain, logits = trained_one_step(False, dropout, bottleneck=bottleneck)
    checkpointed, same_logits = trained_one_step(True, dropout, bottleneck=bottleneck)
    assert torch.equal(logits, same_logits)
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters()):
        assert p.grad.abs().sum() > 0, name
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7, msg=name)
    for (name, b), c in zip(plain.named_buffers(), checkpointed.buffers()):
        assert torch.equal(b, c), f"{name} moved twice"
    norms = [m for m in checkpointed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.num_batches_tracked == 1 and m.momentum == 0.1 for m in norms)


def test_without_the_context_the_statistics_would_move_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test above can fail: this is what checkpointing does to BatchNorm when nobody cares."""
    monkeypatch.setattr(densenet, "running_statistics_held", lambda module: nullcontext())
    model, _ = trained_one_step(True)
    first_layer = model.stages[0][0].layers[0]
    assert first_layer.norm1.num_batches_tracked == 2


class CountConvolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_backward_recomputes_no_convolution() -> None:
    model = densenet.cifar_densenet(
        16, growth_rate=4, bottleneck=True, checkpointing=True, num_classes=10
    )
    with CountConvolutions() as forward:
        loss = model(torch.randn(2, 3, 8, 8)).sum()
    assert forward.count == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    with CountConvolutions() as backward:
        loss.backward()
    assert backward.count == 0


def saved_bytes(checkpointing: bool) -> int:
    """Bytes that stay alive between forward and backward: each storage once, parameters aside."""
    model = densenet.cifar_densenet(40, growth_rate=12, checkpointing=checkpointing, num_classes=10)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    mine |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    def keep_inputs(module: nn.Module, args: tuple) -> None:
        for x in args[0]:  # a checkpoint holds its inputs itself
            pack(x)

    for module in model.modules():
        if isinstance(module, densenet.DenseLayer):
            module.register_forward_pre_hook(keep_inputs)
    x = torch.randn(2, 3, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(x).sum()
    del loss
    return sum(kept.values())


def test_checkpointing_keeps_far_less() -> None:
    assert saved_bytes(True) < saved_bytes(False) / 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_checkpointing_survives_torch_compile(backend: str) -> None:
    plain, logits = trained_one_step(False)
    compiled, same_logits = trained_one_step(True, backend=backend)
    torch.testing.assert_close(same_logits, logits)
    torch.testing.assert_close(compiled.stem[0].weight.grad, plain.stem[0].weight.grad)
    assert all(torch.equal(b, c) for b, c in zip(plain.buffers(), compiled.buffers()))


# The experiments


def test_connection_weights_name_who_is_read() -> None:
    """A net whose layers read nothing but their nearest neighbour, planted by hand."""
    model = densenet.cifar_densenet(16, growth_rate=4, num_classes=10)
    with torch.no_grad():
        for stage in model.stages:
            for layer in stage[-1].layers[1:]:
                layer.conv1.weight[:, :-4] = 0
    for i, table in enumerate(densenet.connection_weights(model)):
        assert table.shape == (5, 5)
        for reader in range(1, 4):
            expected = torch.zeros(reader + 1)
            expected[-1] = reader + 1  # all of the column's weight, over its mean
            torch.testing.assert_close(table[: reader + 1, reader], expected)
            assert table[reader + 1 :, reader].isnan().all(), f"block {i}: not made yet"
        assert table[:, -1].isfinite().all()
        assert table[:, -1].mean().item() == pytest.approx(1)


def test_reading_habits_of_known_tables() -> None:
    flat = torch.ones(13, 13).triu()
    flat[flat == 0] = math.nan
    assert set(densenet.reading_habits(flat).values()) == {1.0}
    deaf = flat.clone()
    deaf[0] = 0.0
    habits = densenet.reading_habits(deaf)
    assert habits["the block's input"] == 0 and habits["the least read"] == 0
    assert habits["newest layers, behind"] == 1


def reuse_says(block_input: float, newest: float, kept: float = 0.1) -> str:
    chance = dict.fromkeys(densenet.reading_habits(torch.ones(4, 4)), 0.05)
    habits = {**dict.fromkeys(chance, 1.0), "the block's input": block_input}
    habits["newest layers, behind"] = newest
    return "\n".join(densenet.reuse_verdict([habits] * 3, chance, kept))


def test_reuse_verdict_follows_the_numbers() -> None:
    assert "own maps: yes" in reuse_says(0.5, 1.0)
    assert "own maps: not beyond chance" in reuse_says(0.98, 1.0)
    assert "own maps: no, the opposite" in reuse_says(1.5, 1.0)
    assert "newest maps: yes" in reuse_says(1.0, 1.2)
    assert "the draw is gone" in reuse_says(1.0, 1.0)
    assert "train longer" in reuse_says(1.0, 1.0, kept=0.9)


def test_forgetting_weight_decay_forgets() -> None:
    """Simulated step by step: what momentum SGD leaves of a weight that no loss renews."""
    config = densenet.Config(lr=0.05, momentum=0.9)
    steps = 400
    decay = densenet.forgetting_weight_decay(config, steps, left=0.05)
    w = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([w], lr=0.05, momentum=0.9, weight_decay=decay)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / steps))
        w.grad = torch.zeros(1)
        optimizer.step()
    assert abs(w.item()) == pytest.approx(0.05, abs=0.03)


def test_equal_cost_depth_and_plain_width_are_the_closest() -> None:
    def macs(depth: int, k: int) -> int:
        return count_macs(densenet.cifar_densenet(depth, k, num_classes=10), (3, 8, 8))

    target = macs(22, 12)
    for k in (6, 24):
        depth = densenet.equal_cost_depth(k, target, (3, 8, 8))
        gap = abs(macs(depth, k) - target)
        assert gap <= min(abs(macs(depth + 3, k) - target), abs(macs(depth - 3, k) - target))
    dense = count_parameters(densenet.cifar_densenet(22, 12, num_classes=10))
    width = densenet.plain_width(22, 12)
    chains = [
        count_parameters(densenet.cifar_densenet(22, w, dense=False, num_classes=10))
        for w in (width, width + 1)
    ]
    assert chains[0] <= dense < chains[1]


def test_gradient_profile_leaves_no_trace() -> None:
    model = densenet.cifar_densenet(13, growth_rate=4, num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
    moved = densenet.gradient_profile(model, x, y)
    assert len(moved) == 9 and min(moved) > 0
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    # By hand, for one layer: the loss falls along the gradient by its squared norm.
    weight = model.stages[1][-1].layers[0].conv1.weight
    F.cross_entropy(model(x), y).backward()
    assert moved[3] == pytest.approx((weight.grad.norm() / weight.norm()).item(), rel=1e-4)


class FakeTrial:
    def __init__(self, top1: float, loss: float = 0.1, macs: int = 1) -> None:
        self.test_top1, self.macs = top1, macs
        self.history = [type("Last", (), {"train_loss": loss})]


@pytest.mark.parametrize(
    ("dense", "chain", "expected"),
    [
        ([1.2, 1.3], [5.0, 6.0], "the claim holds"),
        ([7.0, 8.0], [5.0, 6.0], "the claim fails"),
        ([1.2, 5.5], [5.0, 6.0], "does not show"),
    ],
)
def test_gradient_verdict(dense: list[float], chain: list[float], expected: str) -> None:
    uneven = {(k, d): v for k, v in (("dense", dense), ("chain", chain)) for d in (10, 22)}
    trials = {"dense": FakeTrial(0.9, 0.2), "chain": FakeTrial(0.8, 0.1)}
    profiles = {"dense": [1.0, 1.0], "chain": [0.5, 1.0]}
    text = "\n".join(densenet.gradient_verdict(profiles, uneven, trials, [10, 22]))
    assert expected in text
    assert "the chain net trains better" in text
    assert "chain, 22 layers, untrained: on its way back the gradient shrinks to 0.5" in text


def test_growth_verdict_knows_chance() -> None:
    races = {"equal depth": [(6, 22), (12, 22)], "equal cost": [(6, 40), (12, 22)]}
    trials = {
        (6, 22): [FakeTrial(0.80, 0.30, macs=10), FakeTrial(0.80, 0.32, macs=10)],
        (12, 22): [FakeTrial(0.95, 0.10, macs=30), FakeTrial(0.95, 0.14, macs=30)],
        (6, 40): [FakeTrial(0.94, 0.11, macs=30), FakeTrial(0.94, 0.11, macs=30)],
    }
    fit, depth, fit_cost, cost, price = densenet.growth_verdict(trials, races, test_images=360)
    assert fit.endswith("the training loss falls as k grows: 0.3100, 0.1200")
    assert "k 12 with 22 layers tests best" in depth
    assert "rises as k grows: 0.1100, 0.1200" in fit_cost and "overlap" in fit_cost
    assert "no growth rate is ahead" in cost
    assert "3.0 times" in price and "+15.00%" in price


# The whole path through the command line


@pytest.mark.parametrize(
    ("experiment", "figure", "rows"),
    [
        ("reuse", "reuse", 4),
        ("growth-rate", "growth_rate", 3),
        ("gradient-flow", "gradient_flow", 2),
    ],
)
def test_experiments_in_miniature(
    cli: Callable, tmp_path: Path, experiment: str, figure: str, rows: int
) -> None:
    code, out, err = cli(
        "06", "--experiment", experiment, "--dataset", "digits", "--smoke", "--device", "cpu",
        "--growth-rate", "2", "--rates", "2,4", "--depth", "10", "--depths", "7,10", "--seeds", "1",
    )  # fmt: skip
    assert code == 0, err
    (outcome,) = (tmp_path / "runs").rglob("experiment.json")
    assert len(json.loads(outcome.read_text())["rows"]) == rows
    assert "verdict" in out
    assert (outcome.parent / f"{figure}.png").stat().st_size > 10_000


def test_run_in_miniature_with_checkpointing(cli: Callable, tmp_path: Path) -> None:
    results = []
    for flag in ("--checkpointing", "--no-checkpointing"):
        code, _, err = cli(
            "06", "--dataset", "digits", "--smoke", "--device", "cpu", "--growth-rate", "4", flag
        )  # fmt: skip
        assert code == 0, err
    for path in (tmp_path / "runs").rglob("result.json"):
        results.append(json.loads(path.read_text()))
    one, other = results
    assert one["params"] == other["params"] < 200_000
    assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--experiment", "growth-rate", "--rates", "12"], "--rates"),
        (["--experiment", "growth-rate", "--depth", "23"], "3n + 4"),
        (["--experiment", "gradient-flow", "--depths", "10,x"], "--depths"),
        (["--experiment", "gradient-flow", "--depths", "10,20"], "3n + 4"),
        (["--dropout", "1.5"], "--dropout"),
        (["--growth-rate", "0"], "--growth-rate"),
    ],
)
def test_bad_input_is_one_line(cli: Callable, flags: list[str], word: str) -> None:
    code, _, err = cli("06", "--dataset", "digits", "--device", "cpu", *flags)
    assert code == 2
    assert word in err and err.count("\n") == 1
