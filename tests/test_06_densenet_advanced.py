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

from common.experiments import Experiment
from common.profiling import count_macs, count_parameters
from tests.conftest import lesson
from tests.parity import PUBLISHED, assert_is_torchvisions
from tests.simulation import assert_calm, assert_calm_at_the_bar, results_of

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
    monkeypatch.setattr(densenet, "statistics_held", lambda norm: nullcontext())
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
    for columns in densenet.connection_weights(model):
        assert [len(column) for column in columns] == [1, 2, 3, 4, 5]
        for column in columns[:-1]:
            expected = torch.zeros(len(column))
            expected[-1] = len(column)  # all of the column's weight, over its mean
            torch.testing.assert_close(column, expected)
        assert columns[-1].min() > 0
        assert columns[-1].mean().item() == pytest.approx(1)


def test_remarks_of_a_net_that_reads_all_alike_but_the_transitions_output() -> None:
    """Every weight is 1, but the second and the third block read their input with a half."""
    model = densenet.cifar_densenet(16, growth_rate=4, num_classes=10)
    with torch.no_grad():
        for i, stage in enumerate(model.stages):
            for layer in stage[-1].layers:
                layer.conv1.weight.fill_(1.0)
                layer.conv1.weight[:, : stage[-1].channels[0]] = 0.5 if i else 1.0
            if i:
                stage[0][2].weight.fill_(1.0)
        model.get_classifier().weight.fill_(1.0)
    said = densenet.remarks(model)
    # Of columns (0.5, 1), (0.5, 1, 1), (0.5, 1, 1, 1), each over its mean.
    shares = [0.5 / 0.75, 0.5 / (2.5 / 3), 0.5 / (3.5 / 4)]
    below = 1 - sum(shares) / 3
    assert said["transition's output, below average"] == pytest.approx(below, rel=1e-5)
    assert said["least read by transitions"] == pytest.approx(1)
    assert said["classifier, newest above average"] == pytest.approx(0, abs=1e-6)


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


def on_cifar(depth: int, k: int, **options: bool) -> nn.Module:
    with torch.device("meta"):
        return densenet.cifar_densenet(depth, k, num_classes=10, **options)


@pytest.mark.parametrize("side", [8, 32])
def test_the_growth_rates_cost_the_same_and_no_depth_is_closer(side: int) -> None:
    def macs(depth: int, k: int) -> int:
        return count_macs(on_cifar(depth, k), (3, side, side))

    target = macs(22, 12)
    for k, depth in densenet.EQUAL_COST.items():
        gap = abs(macs(depth, k) - target)
        assert gap <= 0.08 * target
        assert gap <= min(abs(macs(depth + 3, k) - target), abs(macs(depth - 3, k) - target))


def test_the_chains_are_as_wide_as_the_parameters_allow() -> None:
    for depth, width in densenet.CHAIN_WIDTH.items():
        dense = count_parameters(on_cifar(depth, 12))
        chain, wider = (
            count_parameters(on_cifar(depth, w, dense=False)) for w in (width, width + 1)
        )
        assert 0.97 * dense < chain <= dense < wider


def test_gradient_profile_by_hand() -> None:
    """The share of itself by which one step of gradient descent at rate 1 moves a layer."""
    torch.manual_seed(0)
    model = densenet.cifar_densenet(13, growth_rate=4, num_classes=10)
    moved = densenet.gradient_profile(model, torch.randn(8, 3, 8, 8), torch.arange(8))
    assert len(moved) == 9 and min(moved) > 0
    weight = model.stages[1][-1].layers[0].conv1.weight
    before = weight.detach().clone()
    torch.optim.SGD([weight], lr=1.0).step()
    assert moved[3] == pytest.approx(((weight - before).norm() / before.norm()).item(), rel=1e-4)


DESIGNS = {
    "reuse": densenet.reuse,
    "growth-rate": densenet.growth_rates,
    "gradient-flow": densenet.gradient_flow,
}


@pytest.fixture(scope="module", params=DESIGNS)
def experiment(request: pytest.FixtureRequest) -> Experiment:
    return DESIGNS[request.param](densenet.Config().resolve("digits"))


def test_equal_nets_are_not_told_apart(experiment: Experiment) -> None:
    calm = assert_calm if len(experiment.arms) > 1 else assert_calm_at_the_bar
    calm(experiment, seeds=3)


@pytest.mark.parametrize(
    ("higher", "lower", "expected"),
    [
        ([9.8, 9.7, 9.8], [0.1, 0.11, 0.1], "holds"),
        ([0.1, 0.11, 0.1], [9.8, 9.7, 9.8], "fails"),
        ([0.9, 0.1, 0.95], [0.1, 0.95, 0.6], "undecided"),
    ],
)
def test_every_claim_holds_fails_or_stays_open(
    experiment: Experiment, higher: list[float], lower: list[float], expected: str
) -> None:
    for i, claim in enumerate(experiment.claims):
        values = {arm.name: [0.5, 0.5, 0.5] for arm in experiment.arms}
        values |= {claim.higher: higher} | ({claim.lower: lower} if claim.lower in values else {})
        if claim.lower not in values and expected == "fails":  # against a number: below it
            values[claim.higher] = [-9.8, -9.7, -9.8]
        assert results_of(experiment, values, 359).verdicts()[i].outcome == expected


# The whole path through the command line


def test_an_experiment_in_miniature(cli: Callable, tmp_path: Path) -> None:
    code, out, err = cli(
        "06", "--experiment", "reuse", "--dataset", "digits", "--smoke", "--device", "cpu",
        "--growth-rate", "2", "--seeds", "1",
    )  # fmt: skip
    assert code == 0, err
    (outcome,) = (tmp_path / "runs").rglob("experiment.json")
    assert len(json.loads(outcome.read_text())["rows"]) == 1
    assert out.count("undecided") == 4
    assert (outcome.parent / "reuse.png").stat().st_size > 10_000


def test_run_in_miniature_with_checkpointing(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for flag in ("--checkpointing", "--no-checkpointing"):
        code, _, err = cli(
            "06", "--dataset", "digits", "--smoke", "--device", "cpu", "--growth-rate", "4", flag,
            "--batch-size", "16",
        )  # fmt: skip
        assert code == 0, err
        monkeypatch.setattr(densenet, "draw_figures", lambda *parts: None)  # once is enough
    for path in (tmp_path / "runs").rglob("result.json"):
        results.append(json.loads(path.read_text()))
    one, other = results
    assert one["params"] == other["params"] < 200_000
    assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--dropout", "1.5"], "--dropout"),
        (["--growth-rate", "0"], "--growth-rate"),
        (["--experiment", "reuse", "--lr", "1e-5", "--smoke"], "--lr"),
    ],
)
def test_bad_input_is_one_line(cli: Callable, flags: list[str], word: str) -> None:
    code, _, err = cli("06", "--dataset", "digits", "--device", "cpu", *flags)
    assert code == 2
    assert word in err and err.count("\n") == 1
