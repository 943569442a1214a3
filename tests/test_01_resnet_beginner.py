"""Lesson 1: what the paper's tables and a hand count
say of its networks, and its experiment in miniature.
"""

from __future__ import annotations

import doctest
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.experiments import Experiment
from common.profiling import count_macs, count_parameters
from tests.conftest import lesson
from tests.parity import PUBLISHED, assert_is_torchvisions
from tests.simulation import assert_calm, results_of

resnet = lesson("01")
MODELS = resnet.MODELS


def test_doctests() -> None:
    failed, attempted = doctest.testmod(resnet)
    assert attempted >= 6 and failed == 0


@pytest.mark.parametrize("model", [name for name in MODELS if name in PUBLISHED])
def test_torchvision_and_the_published_table_agree(model: str) -> None:
    with torch.device("meta"):
        net = MODELS[model]()
    assert_is_torchvisions(net, model)


@pytest.mark.parametrize(
    ("model", "options", "params"),
    [
        ("resnet20", {}, 269_722),  # option A, as published: 0.27M
        ("resnet20", {"shortcut": "B"}, 272_474),
        ("resnet32", {}, 464_154),  # 0.46M
        ("resnet44", {}, 658_586),  # 0.66M
        ("resnet56", {}, 853_018),  # 0.85M
        ("resnet110", {}, 1_727_962),  # 1.7M
        ("resnet18", {"small_input": True}, 11_173_962),  # kuangliu/pytorch-cifar
    ],
)
def test_cifar_forms_have_the_published_parameters(model: str, options: dict, params: int) -> None:
    assert count_parameters(MODELS[model](num_classes=10, **options)) == params


def test_squeeze_excitation_adds_its_hand_count() -> None:
    # Per block 2 C^2/16 weights and C/16 + C biases; Hu et al. 2018, eq. 5. resnet50: 3, 4, 6, 3
    # blocks.
    blocks = [(3, 256), (4, 512), (6, 1024), (3, 2048)]
    extra = sum(n * (2 * c * c // 16 + c // 16 + c) for n, c in blocks)
    with torch.device("meta"):
        assert count_parameters(MODELS["se_resnet50"]()) == 25_557_032 + extra


def test_plain_net_is_the_resnet_without_its_projections() -> None:
    projections = sum(a * b + 2 * b for a, b in [(64, 128), (128, 256), (256, 512)])
    with torch.device("meta"):
        assert count_parameters(MODELS["plainnet18"]()) == 11_689_512 - projections
        assert count_parameters(MODELS["plainnet34"]()) == 21_797_672 - projections


def test_macs_of_resnet20_by_hand() -> None:
    """Sec. 4.2 at 32x32: a stem, then three stages of six 3x3 convolutions, halved and doubled."""
    stem = 32 * 32 * 3 * 16 * 9
    first = 6 * 32 * 32 * 16 * 16 * 9
    second = 16 * 16 * 9 * (16 * 32 + 5 * 32 * 32)
    third = 8 * 8 * 9 * (32 * 64 + 5 * 64 * 64)
    assert count_macs(MODELS["resnet20"](num_classes=10), (3, 32, 32)) == (
        stem + first + second + third + 64 * 10
    )


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_zero_residual_branch_is_the_identity(block: type[nn.Module]) -> None:
    """With the last BatchNorm at zero a block passes on relu(x), to the bit."""
    channels = 16 * block.expansion
    unit = block(channels, 16)
    last = unit.bn2 if block is resnet.BasicBlock else unit.bn3
    nn.init.zeros_(last.weight)
    x = torch.randn(2, channels, 8, 8)
    assert torch.equal(unit(x), x.relu())


def test_zero_init_is_an_option_that_is_on() -> None:
    on, off = MODELS["resnet18"](), MODELS["resnet18"](zero_init_residual=False)
    assert on.stages[0][0].bn2.weight.abs().sum() == 0
    assert off.stages[0][0].bn2.weight.min() == 1


def test_option_a_subsamples_and_pads() -> None:
    x = torch.randn(1, 16, 8, 8)
    y = resnet.PadShortcut(16, 32, stride=2)(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert y[:, 16:].abs().sum() == 0


def test_identity_of_preactivation_is_untouched() -> None:
    """From the stem to the sum nothing rectifies:
    with a dead branch negative values come through.
    """
    unit = resnet.PreActBlock(16, 16)
    nn.init.zeros_(unit.conv2.weight)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(unit(x), x)


def test_unknown_shortcut_and_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="shortcut is 'A'"):
        MODELS["resnet18"](shortcut="D")
    with pytest.raises(ValueError, match="6n \\+ 2"):
        resnet.cifar_resnet(21)


def test_option_c_projects_where_the_shape_stays_too() -> None:
    extra = 3 * (16**2 + 2 * 16) + 2 * (32**2 + 2 * 32) + 2 * (64**2 + 2 * 64)
    b, c = (count_parameters(MODELS["resnet20"](num_classes=10, shortcut=o)) for o in "BC")
    assert c - b == extra


def test_zero_init_leaves_plain_blocks_alone() -> None:
    """A plain net whose last norms were zero would give zero for every image."""
    net = resnet.cifar_resnet(8, resnet.PlainBlock, num_classes=10)
    assert all(block.bn2.weight.min() == 1 for stage in net.stages for block in stage)


def test_experiment_in_miniature(cli: Callable, tmp_path: Path) -> None:
    code, out, err = cli(
        "01", "--experiment", "skip-connections", "--deep", "4", "--dataset", "digits",
        "--smoke", "--device", "cpu", "--seeds", "1", "--batch-size", "16",
    )  # fmt: skip
    assert code == 0, err
    (outcome,) = (tmp_path / "runs").rglob("experiment.json")
    outcome_text = json.loads(outcome.read_text())
    assert [r["name"] for r in outcome_text["rows"]] == [
        f"{family}-{depth}" for family in resnet.FAMILIES for depth in (20, 26)
    ]
    assert out.count("decides nothing") == 3
    layers = [len(r["gradient by layer, at the start"]) for r in outcome_text["trainings"]]
    assert layers == [19, 25] * 3
    assert (outcome.parent / "skip_connections.png").stat().st_size > 10_000


def design() -> Experiment:
    return resnet.skip_connections(resnet.Config(deep=5).resolve("digits"))


def test_verdicts_are_calm() -> None:
    assert_calm(design(), seeds=3)
    assert_calm(design(), seeds=5)


@pytest.mark.parametrize(
    ("plain", "residual", "expected"),
    [
        # in loss: of plain-20 and plain-32, of residual-20 and residual-32
        ((0.1, 0.5), (0.1, 0.1), ["holds", "holds", "fails"]),
        ((0.1, 0.5), (0.1, 0.9), ["holds", "fails", "holds"]),
        ((0.5, 0.1), (0.1, 0.11), ["fails", "fails", "undecided"]),
        ((0.1, 0.15), (0.1, 0.1), ["undecided", "undecided", "fails"]),
    ],
)
def test_verdict_follows_the_numbers(plain: tuple, residual: tuple, expected: list[str]) -> None:
    """As loss and as accuracy: the third claim wants residual-32 above plain-32."""
    noise = np.random.default_rng(0).normal(0, 0.003, (4, 5))
    means = zip(("plain-20", "plain-32", "residual-20", "residual-32"), plain + residual)
    values = {name: (mean + noise[i]).tolist() for i, (name, mean) in enumerate(means)}
    verdicts = results_of(design(), values, images=359).verdicts()
    assert [v.outcome for v in verdicts] == expected
