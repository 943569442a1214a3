"""MobileNet against torchvision, the tables of its papers, and itself."""

from __future__ import annotations

import doctest
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from common.engine.errors import UserError
from common.profiling import count_macs, count_parameters
from tests.conftest import lesson as find_lesson
from tests.parity import PUBLISHED, largest_difference, torchvision_twin

lesson = find_lesson("05")
IN_TORCHVISION = [name for name in lesson.MODELS if name in PUBLISHED]


def test_doctests() -> None:
    failed, attempted = doctest.testmod(lesson)
    assert attempted >= 12 and failed == 0


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return lesson.MODELS[name](**options)


# --- torchvision, at widths other than 1, which tests/test_models.py checks ----------------------


def test_torchvision_has_all_but_the_first() -> None:
    assert [*IN_TORCHVISION] == ["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"]


@pytest.mark.parametrize("width_mult", [0.5, 1.4])
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


# --- quantisation -------------------------------------------------------------------------------


def coloured_noise(images: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    colours = 3 * torch.randn(images, 3, 1, 1, generator=generator)
    return colours + torch.randn(images, 3, 16, 16, generator=generator)


@pytest.fixture(scope="module")
def versions() -> dict[str, nn.Module]:
    """V1 cut short after two blocks, its BatchNorms used to some images, in each precision."""
    torch.manual_seed(0)
    blocks = [lesson.DepthwiseSeparable(16, 32), lesson.DepthwiseSeparable(32, 64, stride=2)]
    model = lesson.MobileNet(lesson.ConvBN(3, 16, 3), blocks, head=[nn.Linear(64, 10)])
    images = coloured_noise(64, seed=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 2)
            nn.init.normal_(module.bias, 0, 0.2)
    nn.init.normal_(model.get_classifier().weight)
    with torch.no_grad():
        for _ in range(20):
            model(images)
    return lesson.quantized_versions(model, images, lesson.choose_backend(""))


def test_folding_is_the_formula(versions: dict[str, nn.Module]) -> None:
    conv, norm, _ = versions["FP32"].stem
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = versions["FP32 folded"].get_submodule("stem.0")[0]
    assert torch.allclose(folded.weight, conv.weight * factor[:, None, None, None], atol=1e-6)
    assert torch.allclose(folded.bias, norm.bias - factor * norm.running_mean, atol=1e-6)


def test_no_batch_norm_is_left(versions: dict[str, nn.Module]) -> None:
    for name, model in versions.items():
        left = any("BatchNorm" in type(m).__name__ for m in model.modules())
        assert left == (name == "FP32")


@torch.no_grad()
def test_weights_are_integers_with_one_scale_per_channel(versions: dict[str, nn.Module]) -> None:
    tensor, channel = (versions[n].get_submodule("stem.0").weight() for n in lesson.PRECISIONS[2:])
    assert tensor.dtype == channel.dtype == torch.qint8
    assert tensor.qscheme() == torch.per_tensor_affine
    assert channel.qscheme() == torch.per_channel_affine
    assert len(channel.q_per_channel_scales()) == len(channel)
    # 255 steps from the largest weight to its negative; rounding goes at most half a step wrong.
    exact = versions["FP32 folded"].get_submodule("stem.0")[0].weight
    step = exact.abs().amax(dim=(1, 2, 3)) / 127.5
    assert torch.allclose(channel.q_per_channel_scales().float(), step, rtol=1e-3)
    error = (channel.dequantize() - exact).abs().amax(dim=(1, 2, 3))
    assert (error <= 0.51 * step).all()


def test_integers_answer_alike(versions: dict[str, nn.Module]) -> None:
    x = coloured_noise(128, seed=1)
    with torch.inference_mode():
        logits = {name: model(x) for name, model in versions.items()}
    exact = logits["FP32"]
    assert (logits["FP32 folded"] - exact).abs().max() < 1e-4 * exact.std()
    for name in lesson.PRECISIONS[2:]:
        assert not torch.equal(logits[name], exact)
        # How the images differ from the average image is what survives or does not.
        both = [(values - exact.mean(0)).flatten() for values in (logits[name], exact)]
        assert torch.corrcoef(torch.stack(both))[0, 1] > 0.9


def test_integers_take_a_quarter_of_the_room() -> None:
    """Of a layer large enough for names and scales not to count: 4 bytes a weight, then one."""
    model = lesson.MobileNet(lesson.ConvBN(3, 8, 3), [lesson.ConvBN(8, 256)], [nn.Linear(256, 999)])
    made = lesson.quantized_versions(model, coloured_noise(4, 0), lesson.choose_backend(""))
    size = {name: lesson.megabytes(version) for name, version in made.items()}
    weights = 3 * 8 * 9 + 8 * 256 + 256 * 999
    assert size["FP32"] == pytest.approx(4 * weights / 1e6, rel=0.05)
    assert size["INT8 tensor"] == pytest.approx(weights / 1e6, rel=0.05)


def test_a_scale_per_channel_rounds_better(versions: dict[str, nn.Module]) -> None:
    folded = versions["FP32 folded"]
    tensor, channel = (
        lesson.weight_errors(folded, versions[name]) for name in lesson.PRECISIONS[2:]
    )
    convolutions = sum(isinstance(m, nn.Conv2d) for m in folded.modules())
    assert len(tensor) == len(channel) == convolutions == 5
    assert sum(channel.values()) < sum(tensor.values())
    assert all(0 < error < 0.2 for error in (*tensor.values(), *channel.values()))


def test_shortcuts_and_gates_can_be_quantised() -> None:
    model = lesson.MODELS["mobilenet_v3_small"](num_classes=10, small_input=True, width_mult=0.25)
    images = torch.randn(4, 3, 8, 8)
    made = lesson.quantized_versions(model, images, lesson.choose_backend(""))
    with torch.inference_mode():
        assert all(version(images).shape == (4, 10) for version in made.values())


def test_missing_kernels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = type(torch.backends.quantized)
    monkeypatch.setattr(backends, "supported_engines", ["none", "qnnpack"])
    assert lesson.choose_backend("") == "qnnpack"
    with pytest.raises(UserError, match=r"no x86 kernels.*it has: qnnpack"):
        lesson.choose_backend("x86")
    monkeypatch.setattr(backends, "supported_engines", ["none"])
    with pytest.raises(UserError, match="it has: none"):
        lesson.choose_backend("")


def test_a_missing_api_is_told(monkeypatch: pytest.MonkeyPatch, cli: Callable) -> None:
    monkeypatch.setitem(sys.modules, "torch.ao.quantization.quantize_fx", None)
    code, _, err = cli("05", "--experiment", "quantize", "--dataset", "digits")
    assert code == 2
    assert "torch.ao.quantization" in err and len(err.strip().splitlines()) == 1


# --- the command line ---------------------------------------------------------------------------

TINY = ("--dataset", "digits", "--device", "cpu", "--smoke", "--clock", "0", "--latency-px", "32")


def outcome_of(cli: Callable, folder: Path, experiment: str, *flags: str) -> dict:
    code, out, err = cli("05", "--experiment", experiment, *TINY, *flags)
    assert code == 0, err
    assert "verdict    " in out
    (path,) = folder.rglob("experiment.json")
    assert (path.parent / f"{experiment}.png").stat().st_size > 10_000
    return json.loads(path.read_text())


def test_training_in_miniature(cli: Callable, tmp_path: Path) -> None:
    code, _, err = cli("05", *TINY, "--model", "mobilenet_v1", "--width-mult", "0.25")
    assert code == 0, err
    (path,) = tmp_path.rglob("result.json")
    result = json.loads(path.read_text())
    assert (result["lesson"], result["model"]) == ("05_mobilenet_advanced", "mobilenet_v1")
    expected = on_meta("mobilenet_v1", num_classes=10, small_input=True, width_mult=0.25)
    assert result["params"] == count_parameters(expected)


def test_separable_in_miniature(cli: Callable, tmp_path: Path) -> None:
    flags = ("--trial-width", "0.25", "--seeds", "1")
    rows = outcome_of(cli, tmp_path, "separable", *flags)["rows"]
    macs = {row["name"].split(",")[0]: row["M MACs"] for row in rows}
    assert 7 < macs["standard"] / macs["separable"] < 9
    assert 1 <= macs["thin standard"] / macs["separable"] < 1.3


def test_multipliers_in_miniature(cli: Callable, tmp_path: Path) -> None:
    flags = ("--width-mults", "0.25,0.5", "--resolution-mults", "0.5,1")
    rows = outcome_of(cli, tmp_path, "multipliers", *flags)["rows"]
    sizes = [(width, px) for px in (4, 8) for width in (0.25, 0.5)]
    assert [row["name"] for row in rows] == [f"width {w} at {px} px" for w, px in sizes]


def test_quantize_in_miniature(cli: Callable, tmp_path: Path) -> None:
    flags = ("--model", "mobilenet_v1", "--width-mult", "0.25")
    outcome = outcome_of(cli, tmp_path, "quantize", *flags)
    assert [row["weights"] for row in outcome["rows"]] == list(lesson.PRECISIONS)
    assert outcome["rows"][3]["MB"] < outcome["rows"][0]["MB"]


@pytest.mark.parametrize(
    "flags",
    [
        ("multipliers", "--width-mults", "0.5,x"),
        ("multipliers", "--width-mults", "0,1"),
        ("multipliers", "--resolution-mults", "0.1,1"),
    ],
)
def test_bad_factors_are_told(cli: Callable, flags: tuple[str, ...]) -> None:
    code, _, err = cli("05", "--dataset", "digits", "--experiment", *flags)
    assert code == 2
    assert flags[1] in err and "Traceback" not in err


# --- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ([0.02], "one pair"),
        ([0.02, 0.01, 0.001], "ahead in all of 3"),
        ([-0.02, -0.01, -0.001], "behind in all of 3"),
        ([0.02, -0.03, 0.0], "ahead in 1 and behind in 1 of 3"),
    ],
)
def test_word_follows_the_seeds(gains: list[float], word: str) -> None:
    assert word in lesson.word_for(gains)


def a_cell(width: float, resolution: float, top1: float) -> object:
    macs = int(1e6 * width**2 * resolution**2)
    trial = lesson.Trial("", 0, macs, top1, 0.0, [])
    return lesson.Cell(width, resolution, int(8 * resolution), trial, macs, macs / 1e5)


@pytest.mark.parametrize(
    ("thin", "small", "expected"),
    [
        (0.95, 0.80, "cut the width"),
        (0.80, 0.95, "cut the resolution"),
        (0.95, 0.95, "make no difference"),
    ],
)
def test_multipliers_verdict(thin: float, small: float, expected: str) -> None:
    cells = [a_cell(0.5, 0.5, 0.5), a_cell(1, 0.5, small), a_cell(0.5, 1, thin), a_cell(1, 1, 0.96)]
    lines = lesson.multipliers_verdict(cells, images=360)
    assert "4.0 times fewer multiply-adds and 4.0 times the speed" in lines[0]
    assert expected in lines[2]
    assert len(lines) == 4 and lines[3].startswith("best is width 1 at 8 px")


@pytest.mark.parametrize(("per_tensor", "expected"), [(0.2, "pays"), (0.05, "does not pay")])
def test_quantize_verdict(per_tensor: float, expected: str) -> None:
    rows = [
        {"weights": name, "MB": mb, "test top-1": 0.95, "answers changed": 3}
        | {"ms, one image": ms, "ms, 224 px": ms, "logits moved": moved}
        for name, mb, ms, moved in zip(
            lesson.PRECISIONS, (4, 4, 1, 1), (10, 8, 5, 20), (0, 0, per_tensor, 0.1)
        )
    ]
    errors = {name: {"stem.0": 0.01, "stages.0": 0.03} for name in lesson.PRECISIONS[2:]}
    lines = lesson.quantize_verdict(rows, errors, 1e-6, 360)
    assert "4.0 times smaller; 2.0 times the speed" in lines[1]
    assert "0.5 times the speed" in lines[2]
    assert "median layer" in lines[3] and "stages.0" in lines[3]
    assert f"a scale per channel {expected} here" in lines[4]
