"""Lesson 4: EfficientNet against torchvision, the paper's table and hand counts."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torchvision
from parity import PUBLISHED, largest_difference, torchvision_twin
from torch import nn

from common.profiling import count_macs, count_parameters

lesson = importlib.import_module("04_efficientnet_advanced")
OFFICIAL = [name for name in lesson.MODELS if name in PUBLISHED]
EVERY_SHAPE = pytest.mark.parametrize("name", lesson.MODELS)


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return lesson.MODELS[name](**options)


def of_type(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


def test_the_family_is_whole() -> None:
    assert OFFICIAL == [f"efficientnet_b{i}" for i in range(8)]


@pytest.mark.parametrize("name", OFFICIAL)
def test_cost_as_published(name: str) -> None:
    model, published = on_meta(name), PUBLISHED[name]
    size = lesson.TABLE[name].image_size
    assert size == int(published["input_px"])
    assert count_parameters(model) == int(published["params"])
    macs = count_macs(model, (3, size, size))
    assert macs == pytest.approx(float(published["gmacs"]) * 1e9, rel=0.005)


@pytest.mark.parametrize("name", OFFICIAL)
def test_logits_equal_torchvision(name: str) -> None:
    twin = torchvision_twin(name, image_size=32)
    ours = on_meta(name).to_empty(device="cpu")
    assert largest_difference(ours, twin, image_size=32) < 1e-4


@pytest.mark.parametrize("name", OFFICIAL)
def test_training_constants_equal_torchvision(name: str) -> None:
    """What logits in eval mode can't show: momentum, dropout, stochastic depth of every block."""
    with torch.device("meta"):
        twin = torchvision.models.get_model(name, weights=None)
    ours = on_meta(name)

    def constants(
        model: nn.Module, depth_type: type[nn.Module], attribute: str
    ) -> dict[str, list[float]]:
        return {
            "norm": [(m.eps, m.momentum) for m in of_type(model, nn.BatchNorm2d)],
            "dropout": [m.p for m in of_type(model, nn.Dropout)],
            "depth": [getattr(m, attribute) for m in of_type(model, depth_type)],
        }

    expected = constants(twin, torchvision.ops.StochasticDepth, "p")
    assert constants(ours, lesson.StochasticDepth, "rate") == expected


@EVERY_SHAPE
def test_stochastic_depth_rises_with_depth(name: str) -> None:
    """From 0 in equal steps; the step times the number of blocks is the rate asked for."""
    model = on_meta(name, stochastic_depth=0.3)
    rates = [module.rate for module in of_type(model, lesson.StochasticDepth)]
    assert len(rates) == len(of_type(model, lesson.MBConv)) > 1
    steps = [after - before for before, after in itertools.pairwise(rates)]
    assert rates[0] == 0
    assert steps == pytest.approx([0.3 / len(rates)] * len(steps))


def test_stochastic_depth_drops_whole_images_at_its_rate_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop, images = lesson.StochasticDepth(0.3), 20_000
    out = drop(torch.ones(images, 2, 2, 2))
    per_image = out.flatten(1)
    assert (per_image == per_image[:, :1]).all(), "an image is kept whole or dropped whole"
    # Five standard errors of a Bernoulli(0.7) mean over 20,000 draws.
    tolerance = 5 * (0.7 * 0.3 / images) ** 0.5
    assert (per_image[:, 0] > 0).float().mean().item() == pytest.approx(0.7, abs=tolerance)
    assert out.mean().item() == pytest.approx(1.0, abs=tolerance / 0.7)
    assert torch.equal(drop.eval()(out), out)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_stochastic_depth_refuses_an_impossible_rate(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        lesson.StochasticDepth(rate)


def test_a_dropped_block_is_the_identity() -> None:
    """The shortcut survives when the branch is dropped; a block without one is never dropped."""
    torch.manual_seed(0)
    x = torch.randn(64, 8, 4, 4)
    out = lesson.MBConv(8, 8, 3, drop_rate=0.5)(x)
    unchanged = (out == x).flatten(1).all(dim=1)
    assert 0 < unchanged.sum() < len(x)
    narrower = lesson.MBConv(8, 16, 3, drop_rate=0.5)(x)
    assert (narrower.flatten(1).abs().sum(dim=1) > 0).all()


def test_squeeze_excitation_scales_whole_channels() -> None:
    """Every pixel of one channel of one image is multiplied by the same gate, between 0 and 1."""
    torch.manual_seed(0)
    x = torch.rand(3, 16, 5, 5) + 0.1
    gate = lesson.SqueezeExcitation(16, squeeze_channels=4)(x) / x
    assert torch.allclose(gate, gate[:, :, :1, :1].expand_as(gate), atol=1e-5)
    assert (gate > 0).all() and (gate < 1).all()
    other = x.clone()
    other[:, 0] += 5  # one channel's mean moves the gates of the others
    moved = lesson.SqueezeExcitation(16, squeeze_channels=4)
    assert not torch.allclose((moved(x) / x)[:, 1:], (moved(other) / other)[:, 1:])


def test_mbconv_parameters_by_hand() -> None:
    """24 -> 40 channels, 5x5, six times wider in the middle; SE squeezes to a quarter of the 24."""
    middle, squeezed = 144, 6
    expand = 24 * middle + 2 * middle
    depthwise = 25 * middle + 2 * middle
    se = (middle * squeezed + squeezed) + (squeezed * middle + middle)
    project = middle * 40 + 2 * 40
    block = lesson.MBConv(24, 40, kernel_size=5, stride=2, expansion=6)
    assert count_parameters(block) == expand + depthwise + se + project


def test_table_1_of_the_paper() -> None:
    """Resolution, channels and layers of B0's seven stages, as Tan and Le print them."""
    model = on_meta("efficientnet_b0")
    x = model.stem(torch.zeros(1, 3, 224, 224, device="meta"))
    assert x.shape == (1, 32, 112, 112)
    seen = []
    for stage in model.stages:
        x = stage(x)
        seen.append((x.shape[2], x.shape[1], len(stage)))
    # The paper prints the resolution that enters a stage; this is what leaves it.
    assert seen == [
        (112, 16, 1),
        (56, 24, 2),
        (28, 40, 2),
        (14, 80, 3),
        (14, 112, 3),
        (7, 192, 4),
        (7, 320, 1),
    ]
    assert model.forward_features(torch.zeros(1, 3, 224, 224, device="meta")).shape == (
        1,
        1280,
        7,
        7,
    )


@EVERY_SHAPE
@pytest.mark.parametrize("size", [8, 32])
def test_small_form_keeps_an_eighth_of_the_resolution(name: str, size: int) -> None:
    model = on_meta(name, num_classes=10, small_input=True)
    image = torch.zeros(2, 3, size, size, device="meta")
    assert model.forward_features(image).shape[2:] == (size // 8, size // 8)
    assert model(image).shape == (2, 10)
    assert count_parameters(model) == count_parameters(on_meta(name, num_classes=10))


@pytest.mark.parametrize("size", [8, 32])
def test_every_parameter_of_the_small_form_gets_a_gradient(size: int) -> None:
    torch.manual_seed(0)
    model = lesson.MODELS["efficientnet_mini"](
        num_classes=10, small_input=True, stochastic_depth=0.0
    )
    model(torch.randn(4, 3, size, size)).square().sum().backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


def test_cost_of_each_direction_doubles_with_phi() -> None:
    """alpha * beta^2 * gamma^2 is about 2, and the counter agrees where little is rounded.

    Depthwise convolutions grow with the width and not with its square, so width falls a bit short.
    """
    for direction in lesson.DIRECTIONS.values():
        product = direction.depth * direction.width**2 * direction.resolution**2
        assert product == pytest.approx(2, rel=0.05)
    base = lesson.Size(1.0, 1.0, 224)
    for name in ("width", "resolution"):
        twice = lesson.stretch(base, lesson.DIRECTIONS[name], 2)
        assert lesson.macs(twice) / lesson.macs(base) == pytest.approx(4, rel=0.1), name


def test_compound_scaling_by_one_step_gives_b2() -> None:
    """phi = 1 is B2 but for the image size. Layers are rounded up: it costs B0 2.6 times, not 2."""
    b2 = lesson.TABLE["efficientnet_b2"]
    grown = lesson.stretch(lesson.Size(1.0, 1.0, 224), lesson.DIRECTIONS["compound"], 1)
    assert grown[:2] == pytest.approx((b2.width_mult, b2.depth_mult))
    # Tan and Le 2019, table 2: 0.39 and 1.0 billion.
    assert lesson.macs(grown) / lesson.macs(lesson.Size(1.0, 1.0, 224)) == pytest.approx(
        1.0 / 0.39, rel=0.05
    )


def test_stretch_to_meets_the_budget_and_leaves_the_other_axes_alone() -> None:
    base, options = lesson.Size(0.7, 0.5, 32), {"small_input": True}
    target = 4 * lesson.macs(base, **options)
    found = {
        name: lesson.stretch_to(target, base, direction, **options)
        for name, direction in lesson.DIRECTIONS.items()
    }
    for name, size in found.items():
        assert lesson.macs(size, **options) == pytest.approx(target, rel=0.1), name
    assert found["depth"]._replace(depth_mult=0.5) == base
    assert found["width"]._replace(width_mult=0.7) == base
    assert found["resolution"]._replace(image_size=32) == base
    assert all(after > before for after, before in zip(found["compound"], base))
