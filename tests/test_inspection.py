"""What common.inspection sees, against cases computed by hand; and that it leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import inspection


class TinyModel(nn.Module):
    """Features, mean over places, a linear head: Grad-CAM is the class's weights times maps."""

    def __init__(self, channels: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Dropout(0.5)),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        )

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


class InPlaceHead(TinyModel):
    """As DenseNet: the forward pass goes on with an activation in place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu_(self.forward_features(x)))


@pytest.fixture
def model() -> TinyModel:
    torch.manual_seed(0)
    return TinyModel()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def expected_cam(features: Tensor, class_weights: Tensor) -> np.ndarray:
    """max(0, sum_k w_k A_k), each image divided by its maximum: d mean(A_k) / d A_k is the same in
    every place.
    """
    cam = torch.einsum("nk,nkhw->nhw", class_weights, features).relu()
    return (cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-30)).detach().numpy()


def test_grad_cam_of_a_linear_head_is_class_weights_times_maps(model: TinyModel, x: Tensor) -> None:
    model.eval()
    classes = [0, 1, 2, 1, 0]
    expected = expected_cam(model.forward_features(x), model.head[-1].weight[classes])
    assert (expected.max(axis=(1, 2)) == 1).any(), (
        "a case in which nothing speaks for any class proves nothing"
    )
    np.testing.assert_allclose(inspection.grad_cam(model, x, classes), expected, atol=1e-5)
    np.testing.assert_allclose(
        inspection.grad_cam(model, x, torch.tensor(classes)), expected, atol=1e-5
    )


def test_grad_cam_explains_the_predicted_class_by_default(model: TinyModel, x: Tensor) -> None:
    predicted = model.eval()(x).argmax(dim=1)
    expected = inspection.grad_cam(model, x, predicted)
    np.testing.assert_array_equal(inspection.grad_cam(model, x), expected)


def test_grad_cam_works_where_the_head_is_in_place_or_frozen_or_gradients_are_off(
    x: Tensor,
) -> None:
    torch.manual_seed(0)
    model = InPlaceHead().requires_grad_(False).eval()
    features = model.forward_features(x)
    classes = [0, 1, 2, 1, 0]
    # The activation belongs to the head: the gradient passes where the features are positive.
    gradient = model.head[-1].weight[classes][:, :, None, None] * (features > 0)
    cam = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()
    expected = (cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-30)).numpy()
    assert expected.any()
    np.testing.assert_allclose(inspection.grad_cam(model, x, classes), expected, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(inspection.grad_cam(model, x, classes), expected, atol=1e-5)
    with torch.inference_mode():
        np.testing.assert_allclose(inspection.grad_cam(model, x + 0, classes), expected, atol=1e-5)


def test_grad_cam_is_zero_where_nothing_speaks_for_the_class(model: TinyModel, x: Tensor) -> None:
    nn.init.zeros_(model.head[-1].weight)
    heat = inspection.grad_cam(model, x)
    assert heat.shape == (5, 4, 4) and not heat.any()


def test_grad_cam_shows_the_places_of_the_maxima_where_the_head_takes_maxima(
    model: TinyModel, x: Tensor
) -> None:
    model.head[0] = nn.AdaptiveMaxPool2d(1)
    features = model.eval().forward_features(x).detach()
    expected = np.zeros((5, 4, 4), np.float32)
    classes = [0, 1, 2, 1, 0]
    for n, k in np.ndindex(5, 4):  # each channel's maximum times its weight, where it lies
        place = np.unravel_index(int(features[n, k].argmax()), (4, 4))
        weight = model.head[-1].weight[classes[n], k].detach()
        expected[n][place] += float(weight * features[n, k].max())
    expected = expected.clip(min=0)
    expected /= expected.max(axis=(1, 2), keepdims=True).clip(min=1e-30)
    assert expected.any()
    np.testing.assert_allclose(inspection.grad_cam(model, x, classes), expected, atol=1e-5)


def test_grad_cam_takes_an_earlier_stage_where_the_last_map_is_too_small(
    model: TinyModel, x: Tensor
) -> None:
    model.stages.append(nn.Conv2d(4, 4, 4))  # (N, 4, 1, 1)
    model.eval().requires_grad_(False)
    assert inspection.grad_cam(model, x).shape == (5, 4, 4)
    assert inspection.grad_cam(model, x, min_size=1).shape == (5, 1, 1)
    assert inspection.grad_cam(model, x, min_size=99).shape == (5, 1, 1)
    # d score / d A of stage 2 by hand: the last convolution's kernel, weighted by the class.
    second = model.stages[:2](model.stem(x))
    classes = [0, 1, 2, 1, 0]
    kernel, weights = model.stages[2].weight, model.head[-1].weight[classes]
    gradient = torch.einsum("nk,kchw->nchw", weights, kernel)
    expected = expected_cam(second, gradient.mean((2, 3)))
    assert expected.any()
    np.testing.assert_allclose(inspection.grad_cam(model, x, classes), expected, atol=1e-5)


def test_grad_cam_refuses_a_model_that_goes_around_its_features(x: Tensor) -> None:
    class Around(TinyModel):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x))

    model = Around()
    with pytest.raises(ValueError, match="forward_features"):
        inspection.grad_cam(model, x)
    assert "forward_features" not in vars(model)


def test_stage_activations_are_the_outputs_of_the_stages(model: TinyModel, x: Tensor) -> None:
    maps = inspection.stage_activations(model, x[:1])
    with torch.no_grad():
        first = model.eval().stages[0](model.stem(x[:1]))
        second = model.stages[1](first)
    assert list(maps) == ["stage 1", "stage 2"]
    np.testing.assert_allclose(maps["stage 1"], first[0], atol=1e-6)
    np.testing.assert_allclose(maps["stage 2"], second[0], atol=1e-6)
    inner = inspection.stage_activations(model, x[:1], "0")["stage 1"]  # before the ReLU
    assert inner.min() < 0
    np.testing.assert_allclose(np.maximum(inner, 0), maps["stage 1"], atol=1e-6)


def test_named_stages_keep_their_names_and_one_image_is_asked_for(
    model: TinyModel, x: Tensor
) -> None:
    model.stages = nn.Sequential()
    model.stages.add_module("dense_1", nn.Conv2d(4, 4, 1))
    assert list(inspection.stage_activations(model, x[:1])) == ["dense_1"]
    with pytest.raises(ValueError, match="one image"):
        inspection.stage_activations(model, x)


def test_inspection_leaves_no_trace(model: TinyModel, x: Tensor) -> None:
    model.train()
    model.stem[1].eval()  # a frozen BatchNorm among training layers
    model(x).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()

    inspection.first_filters(model)[:] = 0  # a copy: writing to it changes nothing
    inspection.stage_activations(model, x[:1])
    inspection.grad_cam(model, x)

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(gradients[name], p.grad) for name, p in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert "forward_features" not in vars(model)


def test_hooks_and_modes_are_restored_after_an_error(model: TinyModel) -> None:
    model.train()
    wrong = torch.zeros(1, 5, 8, 8)
    for look in (inspection.stage_activations, inspection.grad_cam):
        with pytest.raises(RuntimeError):
            look(model, wrong)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert "forward_features" not in vars(model)


def test_first_filters_are_the_first_convolutions(model: TinyModel) -> None:
    np.testing.assert_array_equal(inspection.first_filters(model), model.stem[0].weight.detach())
    with pytest.raises(ValueError, match="no convolution"):
        inspection.first_filters(nn.Linear(2, 2))


def test_to_images_undoes_normalisation() -> None:
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    x = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    shown = inspection.to_images(x, mean, std)
    assert shown.shape == (2, 4, 5, 3)
    np.testing.assert_allclose(shown, images.permute(0, 2, 3, 1), atol=1e-6)
    beyond = inspection.to_images(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2), (0.5,), (0.5,))
    np.testing.assert_array_equal(
        beyond, [[[[0, 0, 0], [1, 1, 1]]]]
    )  # clipped, and gray in three channels


def test_a_compiled_model_is_looked_at_in_its_plain_form(model: TinyModel, x: Tensor) -> None:
    compiled = torch.compile(model)  # nothing is compiled until it is called
    np.testing.assert_array_equal(inspection.grad_cam(compiled, x), inspection.grad_cam(model, x))
    assert list(inspection.stage_activations(compiled, x[:1])) == ["stage 1", "stage 2"]
