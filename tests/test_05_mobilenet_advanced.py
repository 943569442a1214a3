"""MobileNet against torchvision, the tables of its papers, and itself."""

from __future__ import annotations

import doctest
import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from common.costs import cost_by_kind
from common.experiments import Experiment
from common.integers import framework_integers, has_framework_integers
from common.live import digits
from common.profiling import count_macs, count_parameters
from common.training import make_optimizer
from tests.conftest import lesson as find_lesson
from tests.parity import PUBLISHED, largest_difference, torchvision_twin
from tests.simulation import assert_calm, results_of

lesson = find_lesson("05")
IN_TORCHVISION = [name for name in lesson.MODELS if name in PUBLISHED]


def test_doctests() -> None:
    failed, attempted = doctest.testmod(lesson)
    assert attempted >= 8 and failed == 0


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return lesson.MODELS[name](**options)


# --- torchvision, at widths other than 1, which tests/test_models.py checks ----------------------


def test_torchvision_has_all_but_the_first() -> None:
    assert [*IN_TORCHVISION] == ["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"]


@pytest.mark.parametrize("width_mult", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_other_widths_cost_what_torchvisions_cost(name: str, width_mult: float) -> None:
    ours = on_meta(name, width_mult=width_mult, num_classes=10)
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, width_mult=width_mult, num_classes=10)
    assert count_parameters(ours) == count_parameters(theirs)
    assert count_macs(ours, (3, 96, 96)) == count_macs(theirs, (3, 96, 96))


@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_logits_of_a_thin_net_equal_torchvisions(name: str) -> None:
    twin = torchvision_twin(name, image_size=64, width_mult=0.35)
    ours = lesson.MODELS[name](width_mult=0.35)
    assert largest_difference(ours, twin, image_size=64) < 1e-4


# --- the papers' tables ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width_mult", "millions_of_macs", "millions_of_parameters"),
    [(1.0, 569, 4.2), (0.75, 325, 2.6), (0.5, 149, 1.3), (0.25, 41, 0.5)],
)
def test_v1_width_multipliers(
    width_mult: float, millions_of_macs: int, millions_of_parameters: float
) -> None:
    """Howard et al. 2017, table 6."""
    model = on_meta("mobilenet_v1", width_mult=width_mult)
    assert int(count_macs(model, (3, 224, 224)) / 1e6 + 0.5) == millions_of_macs
    assert round(count_parameters(model) / 1e6, 1) == millions_of_parameters


@pytest.mark.parametrize(
    ("image_size", "millions_of_macs"), [(224, 569), (192, 418), (160, 290), (128, 186)]
)
def test_v1_resolution_multipliers(image_size: int, millions_of_macs: int) -> None:
    """Howard et al. 2017, table 7."""
    macs = count_macs(on_meta("mobilenet_v1"), (3, image_size, image_size))
    assert macs / 1e6 == pytest.approx(millions_of_macs, abs=1)


def test_v1_parameters_by_hand() -> None:
    """The stem; each block's 3x3 filters, 1x1 matrix and two BatchNorms; the classifier."""
    widths = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    stem = 3 * 3 * 3 * 32 + 2 * 32
    blocks = sum(9 * a + 2 * a + a * b + 2 * b for a, b in pairwise(widths))
    classifier = 1024 * 1000 + 1000
    assert count_parameters(on_meta("mobilenet_v1")) == stem + blocks + classifier == 4_231_976


def test_v1_with_standard_convolutions() -> None:
    """Howard et al. 2017, table 4: 29.3 million parameters and 4866 million multiply-adds."""
    model = on_meta("mobilenet_v1", block=lesson.StandardConv)
    assert round(count_parameters(model) / 1e6, 1) == 29.3
    assert count_macs(model, (3, 224, 224)) / 1e6 == pytest.approx(4866, rel=0.001)


def test_v1_cost_by_kind_of_layer() -> None:
    """Howard et al. 2017, table 2, in per cent. Its 1.19% for the stem is left out: the column
    then adds up to 99.29%, and a 3x3 of stride 2 from 3 to 32 channels is 1.9% of 569 million."""
    costs = cost_by_kind(on_meta("mobilenet_v1"), (3, 224, 224))
    printed = {"1x1": (94.86, 74.59), "3x3 depthwise": (3.06, 1.06), "linear": (0.18, 24.33)}
    for kind, percentages in printed.items():
        assert [100 * share for share in costs[kind]] == pytest.approx(percentages, abs=0.03)
    assert costs["3x3"][0] == pytest.approx(112 * 112 * 32 * 27 / 568_740_352)


# --- the blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_channels", "out_channels", "kernel"), [(32, 64, 3), (512, 512, 3)])
def test_a_separable_convolution_costs_the_share_of_the_formula(
    in_channels: int, out_channels: int, kernel: int
) -> None:
    size = (in_channels, 14, 14)
    separable = count_macs(lesson.DepthwiseSeparable(in_channels, out_channels), size)
    standard = count_macs(lesson.StandardConv(in_channels, out_channels), size)
    assert separable / standard == pytest.approx(1 / out_channels + 1 / kernel**2)


def test_a_depthwise_output_depends_on_its_own_channel_alone() -> None:
    depthwise = lesson.DepthwiseSeparable(4, 8).depthwise.eval()
    x = torch.rand(1, 4, 6, 6, requires_grad=True)
    depthwise(x)[0, 2].sum().backward()
    touched = x.grad.abs().sum(dim=(0, 2, 3)) > 0
    assert touched.tolist() == [False, False, True, False]


def test_the_bottleneck_is_linear() -> None:
    """The projection has no activation, so the block's output has negative values."""
    block = lesson.InvertedResidual(8, 16, expanded=48)
    assert [type(m) for m in block.modules()].count(nn.ReLU6) == 2
    assert block(torch.randn(2, 8, 6, 6)).min() < 0


def test_the_shortcut_is_there_where_shapes_allow() -> None:
    """v2 repeats rows 2, 2, 3, 4, 3, 3 times at one shape less the first: 10 shortcuts."""
    for name, expected in [("mobilenet_v2", 10), ("mobilenet_v3_large", 10)]:
        blocks = [m for m in on_meta(name).modules() if isinstance(m, lesson.InvertedResidual)]
        assert sum(block.has_shortcut for block in blocks) == expected
    block = lesson.InvertedResidual(8, 8, expanded=16).eval()
    nn.init.zeros_(block.layers[-1][1].weight)  # the last BatchNorm: the branch adds nothing
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_blocks_with_a_shortcut_start_as_the_identity(name: str) -> None:
    model = lesson.MODELS[name](num_classes=10, small_input=True, width_mult=0.25)
    blocks = [m for m in model.modules() if isinstance(m, lesson.InvertedResidual)]
    for block in blocks:
        first = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
        x = torch.randn(2, first.in_channels, 6, 6)
        if block.has_shortcut:
            assert torch.equal(block(x), x)
        else:
            assert block(x).std() > 0.1


def test_the_gate_scales_whole_channels_between_zero_and_one() -> None:
    x = torch.rand(2, 16, 5, 5) + 0.5
    ratio = lesson.SqueezeExcitation(16)(x) / x
    assert torch.allclose(ratio, ratio[:, :, :1, :1].expand_as(ratio), atol=1e-6)
    assert 0 <= ratio.min() <= ratio.max() <= 1
    assert ratio.std() > 0


def test_hard_swish_is_the_formula_of_the_text() -> None:
    x = torch.linspace(-5, 5, 101)
    assert torch.allclose(nn.Hardswish()(x), x * nn.functional.relu6(x + 3) / 6)


# --- the whole ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", lesson.MODELS)
def test_the_small_form_halves_three_times_and_not_five(name: str) -> None:
    small = on_meta(name, small_input=True)
    large = on_meta(name)
    x = torch.zeros(1, 3, 64, 64, device="meta")
    assert large.forward_features(x).shape[-2:] == (2, 2)
    assert small.forward_features(x).shape[-2:] == (8, 8)
    # The same layers, so that ImageNet's weights fit both.
    assert [p.shape for p in small.parameters()] == [p.shape for p in large.parameters()]


@pytest.mark.parametrize("image_size", [8, 32])
@pytest.mark.parametrize("name", lesson.MODELS)
def test_small_images_train(name: str, image_size: int) -> None:
    model = lesson.MODELS[name](num_classes=10, small_input=True, width_mult=0.25)
    # A norm that starts at zero holds back the gradient of what lies before it, at first.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    logits = model(torch.randn(4, 3, image_size, image_size))
    assert logits.shape == (4, 10)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("name", lesson.MODELS)
def test_a_stage_works_at_one_resolution(name: str) -> None:
    model = on_meta(name)
    x = model.stem(torch.zeros(1, 3, 224, 224, device="meta"))
    sizes = []
    for stage in model.stages:
        inside = []
        for block in stage:
            x = block(x)
            inside.append(x.shape[-1])
        assert len(set(inside)) == 1
        sizes.append(inside[0])
    assert sizes == sorted(set(sizes), reverse=True)


@torch.no_grad()
@pytest.mark.parametrize("name", lesson.MODELS)
def test_no_convolution_shrinks_its_input_at_the_start(name: str) -> None:
    """A depthwise layer initialised as if its fan-out were all channels would, by sqrt(C)."""
    torch.manual_seed(0)
    model = lesson.MODELS[name](num_classes=10, width_mult=0.5)
    for conv in [m for m in model.stages.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]:
        gain = conv(torch.randn(2, conv.in_channels, 16, 16)).std().item()
        assert gain == pytest.approx(2**0.5, rel=0.35)


@pytest.mark.parametrize("name", [n for n in lesson.MODELS if n.startswith("mobilenet_v3")])
def test_v3_has_the_authors_epsilon(name: str) -> None:
    norms = [m for m in on_meta(name).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(0.001, 0.01)}


# --- integers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_quantize_is_torchs(bits: int) -> None:
    """Per tensor with a zero point and per channel without, ends of the range included."""
    torch.manual_seed(0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = 3 * torch.randn(4, 3, 5, 5)
    scale, zero_point = lesson.fit_range(x.min().item() / 2, x.max().item() / 2, bits)
    q = lesson.quantize(x, scale, zero_point, bits)
    assert q.dtype == torch.int8 and (q.min(), q.max()) == (low, high)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    assert torch.allclose(lesson.dequantize(q, scale, zero_point), expected, atol=1e-6)
    scales = lesson.fit_weights(x, bits)
    q = lesson.quantize(x, scales, 0, bits)
    zeros = torch.zeros(4, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scales.flatten(), zeros, 0, low, high)
    assert torch.allclose(lesson.dequantize(q, scales, 0), expected, atol=1e-6)


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 3.0), (2.0, 5.0), (-4.0, -1.0)])
def test_zero_is_exact_and_the_range_is_used_up(low: float, high: float) -> None:
    scale, zero_point = lesson.fit_range(low, high)
    assert lesson.dequantize(torch.tensor(zero_point), scale, zero_point) == 0
    ends = torch.tensor([min(low, 0), max(high, 0)])
    assert lesson.quantize(ends, scale, zero_point).tolist() == [-128, 127]
    x = torch.linspace(float(ends[0]), float(ends[1]), 999)
    back = lesson.dequantize(lesson.quantize(x, scale, zero_point), scale, zero_point)
    assert (back - x).abs().max() <= scale / 2 * 1.01 + scale / 2 * (zero_point % 1)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_float_layer_stands_for_an_integer_one(per_channel: bool) -> None:
    """The same convolution with integers alone, and one multiplication at its end."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 8, 3, padding=1, groups=2), torch.rand(2, 6, 5, 5) * 4 - 1
    scale = lesson.fit_weights(layer.weight.detach(), 8, per_channel)
    weight = lesson.quantize(layer.weight.detach(), scale, 0).long()
    with torch.no_grad():
        precision = lesson.Precision(per_channel=per_channel)
        twin = lesson.IntegerLayer(deepcopy(layer), -1, 3, precision)
        q = lesson.quantize(x, twin.scale, twin.zero_point).long() - twin.zero_point
        sums = nn.functional.conv2d(q, weight, padding=1, groups=2)
        expected = sums * twin.scale * scale.reshape(1, -1, 1, 1) + layer.bias.reshape(1, -1, 1, 1)
        assert torch.allclose(twin(x), expected, atol=1e-5)


@pytest.fixture(scope="module")
def used() -> tuple[nn.Module, torch.Tensor]:
    """A thin V3 with gates and shortcuts, its BatchNorms used to some images; in eval mode."""
    torch.manual_seed(0)
    model = lesson.MODELS["mobilenet_v3_small"](num_classes=10, small_input=True, width_mult=0.25)
    images = digits(40)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
    nn.init.normal_(model.get_classifier().weight)
    with torch.no_grad():
        for _ in range(30):
            model(images)
    return model.eval(), images


@torch.no_grad()
def test_more_bits_and_more_scales_are_closer(used: tuple[nn.Module, torch.Tensor]) -> None:
    model, images = used
    exact = model(images)
    spread = (exact - exact.mean(0)).norm()
    bits = [lesson.Precision(w, a, c) for w, a, c in [(4, 8, 0), (4, 8, 1), (8, 7, 1), (8, 8, 1)]]
    nets = [lesson.to_integers(model, images, precision) for precision in bits]
    errors = [((net(images) - exact).norm() / spread).item() for net in nets]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3
    assert torch.equal(model(images), exact)  # a copy was rounded
    left = {type(m) for m in nets[-1].modules()}
    assert nn.BatchNorm2d not in left and lesson.IntegerLayer in left


@torch.no_grad()
def test_torchs_kernels_are_about_as_far_as_seven_bits(
    used: tuple[nn.Module, torch.Tensor],
) -> None:
    model, images = used
    if not has_framework_integers():
        pytest.skip("this torch has no integer kernels here")
    theirs = framework_integers(model, images)
    ours = lesson.to_integers(model, images, lesson.Precision(8, 7))
    exact = model(images)
    ours, theirs = ((net(images) - exact).norm().item() for net in (ours, theirs))
    assert theirs == pytest.approx(ours, rel=0.5)


def test_torch_without_kernels_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.ao.quantization.quantize_fx", None)
    monkeypatch.delattr("torch.ao.quantization.quantize_fx", raising=False)
    assert not has_framework_integers()
    experiment = lesson.integers(lesson.Config(device="cpu", width_mult=0.25).resolve("digits"))
    assert [arm.name for arm in experiment.arms] == ["float32", *lesson.PRECISIONS]
    assert "nothing to time" in experiment.notes(None)[0]


# --- experiments --------------------------------------------------------------------------------

TINY = "--dataset digits --device cpu --smoke --width-mult 0.25 --batch-size 16".split()
DESIGNS = (lesson.separable, lesson.inverted_residual, lesson.multipliers, lesson.integers)


@pytest.fixture(scope="module", params=DESIGNS, ids=lambda design: design.__name__)
def experiment(request: pytest.FixtureRequest) -> Experiment:
    return request.param(lesson.Config(device="cpu", width_mult=0.25).resolve("digits"))


def test_equal_nets_are_seldom_called_different(experiment: Experiment) -> None:
    assert_calm(experiment)


@pytest.mark.parametrize(
    ("higher", "lower", "outcome"),
    [
        ([0.98, 0.99, 0.98], [0.70, 0.71, 0.70], "holds"),
        ([0.70, 0.71, 0.70], [0.98, 0.99, 0.98], "fails"),
        ([0.70, 0.98, 0.80], [0.80, 0.75, 0.90], "undecided"),
    ],
)
def test_every_claim_has_three_outcomes(
    experiment: Experiment, higher: list[float], lower: list[float], outcome: str
) -> None:
    for claim in experiment.claims:
        alone = replace(experiment, claims=[claim])
        values = dict.fromkeys((arm.name for arm in experiment.arms), lower)
        results = results_of(alone, {**values, claim.higher: higher}, images=359)
        assert results.verdicts()[0].outcome == outcome


@pytest.mark.parametrize("name", lesson.EXPERIMENTS)
def test_experiments_in_miniature(
    cli: Callable, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("costs", "integers"):
        monkeypatch.setattr(f"common.{module}.milliseconds", lambda model, size: 1.0)
    code, _, err = cli("05", "--experiment", name, *TINY, "--seeds", "1")
    assert code == 0, err
    (path,) = tmp_path.rglob("experiment.json")
    outcome = json.loads(path.read_text())
    assert [claim["outcome"] for claim in outcome["claims"]] == ["undecided"] * len(
        outcome["claims"]
    )
    assert (path.parent / f"{name.replace('-', '_')}.png").stat().st_size > 10_000
    if name == "separable":
        macs = {row["name"]: row["M MACs"] for row in outcome["rows"]}
        assert 7 < macs["standard"] / macs["separable"] < 9
        assert 1 <= macs["thin standard"] / macs["separable"] < 1.3
    if name == "multipliers":
        macs = [row["M MACs"] for row in outcome["rows"]]
        assert macs[0] > 2.5 * macs[1] and macs[0] > 2.5 * macs[2]


def test_depthwise_filters_alone_go_without_decay() -> None:
    model = lesson.without_decay(num_classes=10, small_input=True, width_mult=0.25)
    config = lesson.Config().resolve("digits")
    groups = make_optimizer(model, config).param_groups
    shapes = {g["weight_decay"]: {p.dim() for p in g["params"]} for g in groups}
    assert shapes == {config.weight_decay: {2, 4}, 0.0: {1, 4}}
    free = [p for g in groups if g["weight_decay"] == 0 for p in g["params"] if p.dim() == 4]
    assert len(free) == 13 and {p.shape[1:] for p in free} == {(1, 3, 3)}


@torch.no_grad()
def test_variants_of_v2_are_the_same_layers() -> None:
    x = torch.randn(2, 3, 8, 8)
    options = {"num_classes": 10, "small_input": True}
    names = [arm.name for arm in lesson.inverted_residual(lesson.Config().resolve("digits")).arms]
    nets, logits = [], []
    for name in names:
        torch.manual_seed(0)
        nets.append(lesson.v2_variant(name, **options).eval())
        logits.append(nets[-1](x))
    assert len({count_parameters(net) for net in nets}) == 1
    assert len({round(out.std().item(), 9) for out in logits}) == len(names)
    # As many sums as V2 has shortcuts.
    assert wide_sums(nets[names.index("wide shortcut")], x) == 10


def wide_sums(wide: nn.Module, x: torch.Tensor) -> int:
    """How often the map after an expansion has the shape of the one before."""
    shapes: list[torch.Size] = [x.shape]
    blocks = [m for m in wide.modules() if isinstance(m, lesson.InvertedResidual)]
    for block in blocks:
        block.layers[0].register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    wide(x)
    return sum(a == b for a, b in pairwise(shapes))


def test_training_in_miniature(cli: Callable, tmp_path: Path) -> None:
    code, out, err = cli("05", *TINY, "--model", "mobilenet_v1", "--views")
    assert code == 0, err
    (path,) = tmp_path.rglob("result.json")
    result = json.loads(path.read_text())
    assert (result["lesson"], result["model"]) == ("05_mobilenet_advanced", "mobilenet_v1")
    assert f"views      top-1 {result['test_top1_views']:.2%}" in out
    expected = on_meta("mobilenet_v1", num_classes=10, small_input=True, width_mult=0.25)
    assert result["params"] == count_parameters(expected)


@pytest.mark.parametrize("factors", ["0.5,x", "0,1", "0.3"])
def test_bad_factors_are_told(cli: Callable, factors: str) -> None:
    flags = ("--dataset", "digits", "--experiment", "multipliers", "--factors", factors)
    code, _, err = cli("05", *flags)
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
