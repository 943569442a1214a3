"""MobileNet against torchvision, the tables of its papers, and itself."""

from __future__ import annotations

import importlib

import pytest
import torch
import torchvision
from torch import nn

from common.profiling import count_macs, count_parameters
from tests.parity import PUBLISHED, largest_difference, torchvision_twin

lesson = importlib.import_module("05_mobilenet_advanced")
IN_TORCHVISION = [name for name in lesson.MODELS if name in PUBLISHED]


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return lesson.MODELS[name](**options)


# --- torchvision ------------------------------------------------------------------------------


def test_torchvision_has_all_but_the_first() -> None:
    assert [*IN_TORCHVISION] == ["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"]


@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_parameters_and_macs_are_the_published_ones(name: str) -> None:
    model, published = on_meta(name), PUBLISHED[name]
    assert count_parameters(model) == int(published["params"])
    # The table is rounded to a million, which is more than 0.5% of v3_small's 57 of them.
    macs = count_macs(model, (3, 224, 224))
    assert macs / 1e9 == pytest.approx(float(published["gmacs"]), rel=0.005, abs=0.0005)


@pytest.mark.parametrize("width_mult", [0.5, 0.75, 1.4])
@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_other_widths_cost_what_torchvisions_cost(name: str, width_mult: float) -> None:
    ours = on_meta(name, width_mult=width_mult, num_classes=10)
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, width_mult=width_mult, num_classes=10)
    assert count_parameters(ours) == count_parameters(theirs)
    assert count_macs(ours, (3, 96, 96)) == count_macs(theirs, (3, 96, 96))


@pytest.mark.parametrize("width_mult", [1.0, 0.35])
@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_logits_equal_torchvisions(name: str, width_mult: float) -> None:
    twin = torchvision_twin(name, image_size=64, width_mult=width_mult)
    ours = lesson.MODELS[name](width_mult=width_mult)
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
    blocks = sum(9 * a + 2 * a + a * b + 2 * b for a, b in zip(widths, widths[1:]))
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
    costs = lesson.cost_by_kind(on_meta("mobilenet_v1"), (3, 224, 224))
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
