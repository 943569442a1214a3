"""Lesson 2: the family's structure, the small form, receptive fields by hand and by autograd, and
the whole path through the command line.
"""

from __future__ import annotations

import doctest
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from common.profiling import count_macs, count_parameters
from tests.conftest import lesson
from tests.parity import PUBLISHED, assert_is_torchvisions
from tests.simulation import assert_calm, results_of

vgg = lesson("02")
MODELS = vgg.MODELS


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name](**options)


def test_doctests() -> None:
    failed, attempted = doctest.testmod(vgg)
    assert attempted >= 8 and failed == 0


# ------------------------------------------------------------------------------------ architecture


@pytest.mark.parametrize("name", [name for name in MODELS if name in PUBLISHED])
def test_torchvision_and_the_published_table_agree(name: str) -> None:
    assert_is_torchvisions(on_meta(name), name)


@pytest.mark.parametrize("name", MODELS)
def test_depth_is_the_number_in_the_name(name: str) -> None:
    layers = list(on_meta(name).modules())
    weighted = [m for m in layers if isinstance(m, (nn.Conv2d, nn.Linear))]
    norms = [m for m in layers if isinstance(m, nn.BatchNorm2d)]
    assert len(weighted) == int(name.removeprefix("vgg").removesuffix("_bn"))
    assert len(norms) == (len(weighted) - 3 if name.endswith("_bn") else 0)


def test_three_quarters_of_vgg11_is_one_linear_layer() -> None:
    model = on_meta("vgg11")
    assert model.head[2].weight.numel() == 512 * 7 * 7 * 4096
    assert model.head[2].weight.numel() > 0.75 * count_parameters(model)


def test_head_is_silenced_as_told_and_in_training_only() -> None:
    rates = [m.p for m in on_meta("vgg16", dropout=0.3).modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.3, 0.3]  # the first two linear layers, sec. 3.1


def test_initialisation_keeps_the_scale_of_activations_without_batch_norm() -> None:
    """At 64 px, where padding takes little. Scaled by fan_out, it would end 13 times lower."""
    torch.manual_seed(0)
    model = MODELS["vgg16"](num_classes=10, small_input=True).eval()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        for stage in model.stages:
            x = stage(x)
            assert 0.5 < x.square().mean().sqrt() < 5


# -------------------------------------------------------------------------------------- small form


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [8, 16, 28, 32])
def test_small_form_never_shrinks_to_nothing(name: str, size: int) -> None:
    model = on_meta(name, num_classes=10, small_input=True)
    x = torch.zeros(2, 3, size, size, device="meta")
    assert model.forward_features(x).shape == (2, 512, 1, 1)
    assert model(x).shape == (2, 10)


def test_small_form_is_the_one_of_the_cifar_literature() -> None:
    """kuangliu/pytorch-cifar's VGG-16: 13 convolutions with BatchNorm, then Linear(512, 10)."""
    model = on_meta("vgg16_bn", num_classes=10, small_input=True)
    assert count_parameters(model) == 14_728_266
    # Stage by stage at 32, 16, 8, 4 and 2 pixels: area times in times out, nine weights each.
    pairs = {
        32: [(3, 64), (64, 64)],
        16: [(64, 128), (128, 128)],
        8: [(128, 256), (256, 256), (256, 256)],
        4: [(256, 512), (512, 512), (512, 512)],
        2: [(512, 512)] * 3,
    }
    convs = sum(side**2 * 9 * i * o for side, layers in pairs.items() for i, o in layers)
    assert count_macs(model, (3, 32, 32)) == convs + 512 * 10


def test_at_8_px_the_last_two_pools_change_nothing() -> None:
    model = MODELS["vgg11"](num_classes=10, small_input=True).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        for stage in model.stages[3:]:
            stage.pool = nn.Identity()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        model.stages[2].pool = nn.Identity()
        assert not torch.equal(model(x), expected)


def test_every_parameter_gets_a_gradient_at_8_px() -> None:
    torch.manual_seed(0)
    model = MODELS["vgg11_bn"](num_classes=10, small_input=True)
    model(torch.randn(4, 3, 8, 8)).logsumexp(dim=1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(m.weight.grad.any() for m in weighted)


# ---------------------------------------------------------------------------------- receptive field


def test_receptive_fields_of_vgg16_by_hand() -> None:
    fields = vgg.receptive_fields(on_meta("vgg16"))
    # Two convolutions add 2 pixels each and the pool 1; from there a step is 2 pixels, and so on.
    sizes = [3, 5, 6, 10, 14, 16, 24, 32, 40, 44, 60, 76, 92, 100, 132, 164, 196, 212]
    assert [field.size for field in fields] == sizes
    assert fields[-1].jump == 32


@pytest.mark.parametrize(("kernels", "sees"), [((5,), 5), ((3, 3), 5), ((7,), 7), ((3, 3, 3), 7)])
def test_measured_field_of_a_stack_is_the_computed_one(kernels: tuple, sees: int) -> None:
    torch.manual_seed(0)
    stack = vgg.conv_stack(kernels, channels=8)
    image = torch.randn(4, 8, 15, 15, requires_grad=True)
    assert vgg.extent(vgg.centre_gradient(stack(image), image)) == sees
    assert vgg.receptive_fields(stack)[-1].size == sees


def test_three_3x3_cost_27_parts_of_a_7x7_s_49() -> None:
    """Simonyan and Zisserman 2014, sec. 2.3: 3 (3^2 C^2) = 27 C^2 weights against 7^2 C^2."""
    with torch.device("meta"):
        three, one = (vgg.conv_stack(k, channels=64) for k in ((3, 3, 3), (7,)))
    assert count_parameters(three) == 27 * 64**2
    assert count_parameters(one) == 49 * 64**2
    assert count_macs(three, (64, 14, 14)) == 14 * 14 * 27 * 64**2


def test_every_layer_is_looked_at() -> None:
    torch.manual_seed(0)
    model = vgg.VGG((1, 2), channels=(8, 8), num_classes=2, small_input=True)
    seen = vgg.look_at_layers(model, images=4)
    assert [s.name for s in seen] == ["conv1", "pool1", "conv2", "conv3", "pool2"]
    rows = [s.row() for s in seen]
    assert [row["sees (measured)"] for row in rows] == [3, 4, 8, 12, 14]
    assert [row["sees (computed)"] for row in rows] == [3, 4, 8, 12, 14]
    assert [s.parameters for s in seen] == [8 * 28, 0, 8 * 73, 8 * 73, 0]
    # 14 pixels at jumps of 4: the smallest odd map that holds them has 5 positions, 20 pixels.
    assert seen[0].gradient.shape == (20, 20)


def test_effective_field_holds_the_share_and_no_less() -> None:
    gradient = torch.zeros(9, 9)
    gradient[2:7, 2:7] = 1.0  # 25 pixels, 9 of them in the middle 3x3
    assert vgg.effective_extent(gradient, share=9 / 25) == 3
    assert vgg.effective_extent(gradient, share=10 / 25) == 5
    gradient[2, 2:8] = gradient[6, 2:8] = 1e-9  # now the field reaches one column farther
    assert vgg.extent(gradient) == 6


# -------------------------------------------------------------------------------------- whole runs


def test_run_in_miniature(cli: Callable, tmp_path: Path) -> None:
    code, _, err = cli(
        "02", "--dataset", "digits", "--smoke", "--device", "cpu", "--batch-size", "16"
    )
    assert code == 0, err
    (outcome,) = (tmp_path / "runs").rglob("result.json")
    result = json.loads(outcome.read_text())
    assert (result["model"], result["params"]) == ("vgg11_bn", 9_231_114)
    figures = {path.stem for path in outcome.parent.glob("*.png")}
    assert {"filters", "activations", "block_maps", "grad_cam"} <= figures


@pytest.mark.parametrize(("flags", "lr"), [((), 0.01), (("--lr", "0.3"), 0.3)])
def test_plain_nets_get_a_tenth_of_the_rate_unless_told(flags: tuple, lr: float) -> None:
    rate = vgg.parse_flags(vgg.Config, ["--model", "vgg11", *flags]).resolve("digits").lr
    assert rate == pytest.approx(lr)
    assert vgg.Config().resolve("digits").lr == pytest.approx(0.1)


def test_receptive_field_in_miniature(cli: Callable, tmp_path: Path) -> None:
    code, out, err = cli(
        "02", "--experiment", "receptive-field", "--model", "vgg11", "--field-images", "2",
        "--dataset", "digits", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    (outcome,) = (tmp_path / "runs").rglob("experiment.json")
    rows = {row["name"]: row for row in json.loads(outcome.read_text())["rows"]}
    assert rows["three 3x3"]["sees (measured)"] == rows["one 7x7"]["sees (measured)"] == 7
    assert rows["three 3x3"]["parameters"] == 27 * 64**2
    assert rows["pool5"]["sees (measured)"] == rows["pool5"]["sees (computed)"] == 150
    assert "three 3x3 see 7x7 pixels where one 7x7 sees 7x7, with 55% of its weights" in out
    assert (outcome.parent / "receptive_fields.png").stat().st_size > 10_000


def test_experiments_in_miniature(cli: Callable, tmp_path: Path) -> None:
    """One training of each arm, of two batches, decides nothing."""
    code, out, err = cli(
        "02", "--experiment", "batch-norm", "--image-size", "8", "--dataset", "digits", "--smoke",
        "--seeds", "1", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    (outcome,) = (tmp_path / "runs").rglob("experiment.json")
    arms = [row["name"] for row in json.loads(outcome.read_text())["rows"]]
    assert arms == ["plain", "BatchNorm", "plain, rate x10", "BatchNorm, rate x10"]
    assert out.count("undecided") == 3 and "holds" not in out and "fails" not in out


EXPERIMENTS = {"small-filters": vgg.small_filters, "batch-norm": vgg.batch_norm}


@pytest.mark.parametrize("design", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_equal_nets_are_not_told_apart(design: Callable) -> None:
    assert_calm(design(vgg.Config().resolve("digits")), seeds=3)


def test_every_claim_can_hold_fail_and_stay_open() -> None:
    for design in EXPERIMENTS.values():
        experiment = design(vgg.Config().resolve("digits"))
        for i, claim in enumerate(experiment.claims):
            for higher, lower, expected in (
                ([0.98, 0.97, 0.98], [0.5, 0.51, 0.5], "holds"),
                ([0.5, 0.51, 0.5], [0.98, 0.97, 0.98], "fails"),
                ([0.9, 0.8, 0.95], [0.8, 0.95, 0.9], "undecided"),
            ):
                values = {arm.name: [0.7, 0.7, 0.7] for arm in experiment.arms}
                values |= {claim.higher: higher, claim.lower: lower}
                assert results_of(experiment, values, 359).verdicts()[i].outcome == expected


def test_batch_norm_by_hand_is_torchs() -> None:
    """In training and in eval mode, with its running averages and gradients."""
    torch.manual_seed(0)
    ours, theirs = vgg.BatchNorm2d(5), nn.BatchNorm2d(5)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for norm in (ours, theirs):
        nn.init.uniform_(norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        x = torch.randn(4, 5, 6, 7) * 3 + 2
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(x) for norm, x in zip((ours, theirs), inputs)]
        torch.testing.assert_close(*outputs)
        for y in outputs:
            y.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_column_c_is_as_deep_as_d_and_adds_no_view() -> None:
    with torch.device("meta"):
        c, d = (vgg.VGG(row) for row in (vgg.COLUMN_C, vgg.TABLE["vgg16"]))
    convolutions = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (c, d)]
    assert len(convolutions[0]) == len(convolutions[1]) == 13
    assert count_parameters(c) == 133_638_952  # 134 million in the paper's table 2
    three = [m for m in convolutions[0] if m.kernel_size == (3, 3)]
    assert len(three) == 10  # as many as B has
