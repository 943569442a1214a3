"""Lesson 2: every VGG is the paper's network, and its receptive fields are what autograd says."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import nn

from common.profiling import count_macs, count_parameters
from tests.parity import PUBLISHED, largest_difference, torchvision_twin

lesson = import_module("02_vgg_intermediate")
NAMES = list(lesson.MODELS)


def test_the_table_has_torchvisions_eight_names() -> None:
    assert set(NAMES) == {name for name in PUBLISHED if name.startswith("vgg")}
    assert len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_macs_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = lesson.MODELS[name]()
    assert count_parameters(model) == int(PUBLISHED[name]["params"])
    macs = count_macs(model, (3, 224, 224))
    assert macs / 1e9 == pytest.approx(float(PUBLISHED[name]["gmacs"]), rel=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours = lesson.MODELS[name]()  # 140 million weights need no values to be overwritten
    assert largest_difference(ours.to_empty(device="cpu"), torchvision_twin(name)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_depth_is_the_number_in_the_name(name: str) -> None:
    with torch.device("meta"):
        model = lesson.MODELS[name]()
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == int(name.removeprefix("vgg").removesuffix("_bn"))
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == name.endswith("_bn")


def test_three_quarters_of_vgg11_is_one_linear_layer() -> None:
    with torch.device("meta"):
        model = lesson.MODELS["vgg11"]()
    assert model.head[2].weight.numel() == 512 * 7 * 7 * 4096
    assert model.head[2].weight.numel() > 0.75 * count_parameters(model)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [8, 28, 32])
def test_small_form_never_shrinks_to_nothing(name: str, size: int) -> None:
    with torch.device("meta"):
        model = lesson.MODELS[name](num_classes=10, small_input=True)
        x = torch.zeros(2, 3, size, size)
        assert model.forward_features(x).shape == (2, 512, 1, 1)
        assert model(x).shape == (2, 10)


@pytest.mark.parametrize("size", [8, 32])
def test_every_parameter_of_the_small_form_gets_a_gradient(size: int) -> None:
    model = lesson.MODELS["vgg11_bn"](num_classes=10, small_input=True)
    model(torch.randn(4, 3, size, size)).logsumexp(dim=1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(m.weight.grad.any() for m in weighted)


def test_small_form_at_32_px_has_the_paper_s_convolutions_and_a_linear_head() -> None:
    """kuangliu/pytorch-cifar's VGG-16: the same 13 convolutions with BatchNorm, then Linear(512, 10)."""
    with torch.device("meta"):
        model = lesson.MODELS["vgg16_bn"](num_classes=10, small_input=True)
    assert count_parameters(model) == 14_728_266


def test_at_8_px_the_last_two_pools_change_nothing() -> None:
    model = lesson.MODELS["vgg11"](num_classes=10, small_input=True).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        for stage in model.stages[3:]:
            stage.pool = nn.Identity()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        model.stages[2].pool = nn.Identity()
        assert not torch.equal(model(x), expected)


def test_receptive_fields_of_vgg16_by_hand() -> None:
    with torch.device("meta"):
        fields = lesson.receptive_fields(lesson.MODELS["vgg16"]())
    # Two convolutions add 2 pixels each and the pool 1; from there a step is 2 pixels, and so on.
    sizes = [3, 5, 6, 10, 14, 16, 24, 32, 40, 44, 60, 76, 92, 100, 132, 164, 196, 212]
    assert [field.size for field in fields] == sizes
    assert fields[-1].jump == 32


@pytest.mark.parametrize(("kernels", "sees"), [((5,), 5), ((3, 3), 5), ((7,), 7), ((3, 3, 3), 7)])
def test_measured_field_of_a_stack_is_the_computed_one(kernels: tuple[int, ...], sees: int) -> None:
    stack = lesson.conv_stack(kernels, channels=8)
    image = torch.randn(4, 8, 15, 15, requires_grad=True)
    assert lesson.extent(lesson.centre_gradient(stack(image), image)) == sees
    assert lesson.receptive_fields(stack)[-1].size == sees


def test_measured_field_of_two_stages_is_the_computed_one() -> None:
    stages = lesson.MODELS["vgg13"](num_classes=10, small_input=True).stages[:2]
    image = torch.randn(16, 3, 32, 32, requires_grad=True)
    assert lesson.extent(lesson.centre_gradient(stages(image), image)) == 16


def test_three_3x3_cost_27_parts_of_a_7x7_s_49() -> None:
    """Simonyan and Zisserman 2014, sec. 2.3: 3 (3^2 C^2) = 27 C^2 weights against 7^2 C^2 = 49 C^2."""
    with torch.device("meta"):
        three, one = (lesson.conv_stack(k, channels=64) for k in ((3, 3, 3), (7,)))
    assert count_parameters(three) == 27 * 64**2
    assert count_parameters(one) == 49 * 64**2
    assert count_macs(three, (64, 14, 14)) == 14 * 14 * 27 * 64**2
