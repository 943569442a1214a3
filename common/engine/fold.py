"""A model as it would be deployed: without the BatchNorms that a convolution can swallow."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from common.engine.device import evaluating


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference, without the BatchNorms that follow a convolution.

    In eval mode y = (W x - mean) / std * gamma + beta is itself a convolution, of weights
    gamma / std * W and bias beta - gamma / std * mean, so the norm costs nothing. A norm in front
    of a convolution, with a ReLU in between (pre-activation ResNets, DenseNet), has to stay.

    The equality is checked each time, in float64, where nothing but a wrong fold can tell the two
    apart: the rounding of float32 alone moves the logits of a deep net with random weights by
    several percent.

    Raises:
        ValueError: the logits of an image of noise are not the same.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> [type(layer).__name__ for layer in fold_batchnorm(model).children()]
    ['Conv2d', 'ReLU']
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return deepcopy(model).eval()
    from torch.fx.experimental.optimization import fuse

    exact = deepcopy(model).to("cpu", torch.float64).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
        expected = exact(x)
        off = ((fuse(exact)(x) - expected).abs().max() / expected.abs().max()).item()
    if not off < 1e-6:
        raise ValueError(
            f"{type(model).__name__} without its BatchNorms gives logits that are {off:.1e} of the "
            "largest away from its own"
        )
    with evaluating(model):
        folded = fuse(model)
    folded.delete_all_unused_submodules()
    return folded.eval()
