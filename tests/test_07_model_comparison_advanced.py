"""Lesson 7: the timeline's ends against torchvision and hand counts, and the comparison itself."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from common.errors import UserError
from common.lessons import all_models, get_model, lesson_names, load_lesson
from common.pretrained import load_torchvision_state
from common.profiling import count_macs, count_parameters
from tests.parity import PUBLISHED, largest_difference, torchvision_twin

lesson = load_lesson("07")
TWINS = [name for name in lesson.MODELS if name in PUBLISHED]


def build_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return lesson.MODELS[name](**options)


# ------------------------------------------------------------------------------------ the architectures


def test_torchvision_has_these() -> None:
    assert TWINS == ["alexnet", "vit_b_16", "vit_b_32", "vit_l_16"]


@pytest.mark.parametrize("name", TWINS)
def test_parameters_and_macs_as_published(name: str) -> None:
    model, row = build_meta(name), PUBLISHED[name]
    size = int(row["input_px"])
    assert count_parameters(model) == int(row["params"])
    assert count_macs(model, (3, size, size)) / 1e9 == pytest.approx(float(row["gmacs"]), rel=0.005)


@pytest.mark.parametrize("name", ["alexnet", "vit_b_32"])
def test_logits_equal_torchvisions(name: str) -> None:
    size = 64 if name == "alexnet" else 224  # torchvision's ViT takes no other
    assert largest_difference(lesson.MODELS[name](), torchvision_twin(name, size), size) < 1e-4


@pytest.mark.parametrize("name", ["vit_b_16", "vit_l_16"])
def test_logits_equal_torchvisions_two_layers_deep(name: str) -> None:
    """The width and heads of the real model on a small image; every layer of it is the same."""
    row = lesson.TABLE[name]._replace(depth=2)
    torch.manual_seed(0)
    twin = VisionTransformer(64, row.patch_size, 2, row.heads, row.dim, row.mlp_dim).eval()
    nn.init.normal_(twin.heads.head.weight, std=0.1)  # torchvision starts it at zero
    ours = lesson.VisionTransformer(*row, image_size=64)
    assert largest_difference(ours, twin, 64) < 1e-4


@pytest.mark.parametrize("name", TWINS)
def test_every_tensor_of_torchvisions_checkpoint_fits(name: str) -> None:
    with torch.device("meta"):
        state = torchvision.models.get_model(name, weights=None).state_dict()
    load_torchvision_state(build_meta(name), state)


def test_positions_are_interpolated_as_torchvision_does() -> None:
    row = lesson.Row(16, 2, 2, 32, 64)
    torch.manual_seed(0)
    small = VisionTransformer(64, *row)
    nn.init.normal_(small.heads.head.weight, std=0.5)
    nn.init.normal_(small.encoder.pos_embedding)
    large = VisionTransformer(96, *row).eval()
    large.load_state_dict(interpolate_embeddings(96, 16, small.state_dict()))
    ours = lesson.VisionTransformer(*row, image_size=64).eval()
    load_torchvision_state(ours, small.state_dict())
    x = torch.randn(2, 3, 96, 96)
    assert (ours(x) - large(x)).abs().max() < 1e-4


def test_hand_counts() -> None:
    # LeNet-5 with three input channels and a full C3: C1, C3, C5, F6, output, a bias for each unit.
    lenet = (3 * 25 + 1) * 6 + (6 * 25 + 1) * 16 + (400 + 1) * 120 + (120 + 1) * 84 + (84 + 1) * 10
    assert count_parameters(build_meta("lenet5", num_classes=10)) == lenet == 62_006
    convs = (3 * 9 + 1) * 32 + (32 * 9 + 1) * 64 + (64 * 9 + 1) * 128
    simple = convs + (128 * 16 + 1) * 512 + (512 + 1) * 10
    assert count_parameters(build_meta("simple_cnn", num_classes=10)) == simple == 1_147_466
    macs = 32**2 * 3 * 9 * 32 + 16**2 * 32 * 9 * 64 + 8**2 * 64 * 9 * 128 + 2048 * 512 + 512 * 10
    assert count_macs(build_meta("simple_cnn", num_classes=10), (3, 32, 32)) == macs


def test_attention_products_are_counted() -> None:
    """T tokens of width D: 4 T D^2 for the projections, and 2 T^2 D for Q K' and the weighted sum of V."""
    tokens, dim = 65, 64
    with torch.device("meta"):
        block = lesson.EncoderBlock(dim, 4, 2 * dim)
    macs = count_macs(nn.Sequential(nn.Flatten(2), block), (tokens, 1, dim))
    assert macs == 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * tokens * dim * 2 * dim


@pytest.mark.parametrize("name", ["lenet5", "simple_cnn", "alexnet", "vit_xs_16"])
@pytest.mark.parametrize("size", [8, 28, 32])
def test_small_input(name: str, size: int) -> None:
    model = lesson.MODELS[name](num_classes=10, small_input=True)
    if name == "vit_xs_16":
        model.get_classifier().weight.data.normal_()  # born zero, it would pass no gradient on
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(bool(p.grad.any()) for p in model.parameters()) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["lenet5", "simple_cnn", "alexnet", "vit_xs_16"])
def test_width_mult_scales_the_parameters(name: str) -> None:
    params = [
        count_parameters(build_meta(name, num_classes=10, small_input=True, width_mult=w))
        for w in (0.5, 1.0, 2.0)
    ]
    assert 2 < params[1] / params[0] < 5 and 2 < params[2] / params[1] < 5


# ------------------------------------------------------------------------------------ common.lessons


def test_lessons_are_found_by_number_and_by_name() -> None:
    assert "07_model_comparison_advanced" in lesson_names()
    assert load_lesson("07") is load_lesson("07_model_comparison_advanced") is lesson


def test_all_models_holds_every_lessons() -> None:
    models = all_models()
    for name in lesson_names()[:7]:
        assert set(load_lesson(name).MODELS) <= set(models)
    assert get_model("lenet5") is lesson.MODELS["lenet5"]


@pytest.mark.parametrize(
    ("call", "argument", "meant"),
    [(load_lesson, "01_resnet_beginer", "01_resnet_beginner"), (get_model, "resnet81", "resnet18")],
)
def test_an_unknown_name_names_the_closest(call: object, argument: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"unknown .* '{argument}' .did you mean {meant}"):
        call(argument)
