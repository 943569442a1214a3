"""ResNet-9's parts against what they are to compute, and its experiment in miniature."""

from __future__ import annotations

import doctest

import torch
from torch import nn

from common import resnet9
from common.profiling import fold_batchnorm
from common.resnet9 import PatchWhitening, ResNet9
from tests.conftest import lesson


def test_doctests() -> None:
    failed, attempted = doctest.testmod(resnet9)
    assert attempted >= 2 and failed == 0


def test_whitened_patches_are_uncorrelated_with_unit_variance() -> None:
    x = torch.randn(50, 3, 32, 32).cumsum(3) * torch.tensor([1.0, 0.5, 2.0]).view(1, 3, 1, 1)
    layer = PatchWhitening()
    layer.measure(x, eps=0)
    y = layer(x)
    half = y[:, :12].transpose(0, 1).reshape(12, -1)
    torch.testing.assert_close(half @ half.T / half.shape[1], torch.eye(12), atol=2e-3, rtol=0)
    torch.testing.assert_close(y[:, 12:], -y[:, :12])
    assert not layer.weight.requires_grad


def test_kernels_of_resnet9_begin_as_copies_of_their_input() -> None:
    net = ResNet9(num_classes=10)
    convs = [m for m in net.stages.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 7  # with the stem and the classifier: nine
    for conv in convs:
        x = torch.randn(2, conv.in_channels, 6, 6)
        torch.testing.assert_close(conv(x)[:, : conv.in_channels], x)


def test_batchnorm_folds_into_resnet9() -> None:
    net, x = ResNet9((4, 4, 4), num_classes=3).eval(), torch.randn(2, 3, 32, 32)
    nn.init.normal_(net.get_classifier().weight)
    torch.testing.assert_close(fold_batchnorm(net)(x), net(x), atol=1e-4, rtol=1e-4)


def test_the_bag_of_tricks_leaves_out_one_thing_at_a_time() -> None:
    config = lesson("01").Config(experiment="bag-of-tricks").resolve("cifar10")
    experiment = resnet9.bag_of_tricks(config)
    bag, *others = experiment.arms
    assert len(others) == len(experiment.claims) == len(resnet9.TRICKS)
    for arm in others:
        recipe = {k: v for k, v in arm.changes.items() if v != bag.changes[k]}
        net = {k: v for k, v in arm.build.keywords.items() if k not in bag.build.keywords}
        assert bool(recipe) != bool(net), arm.name
        assert arm.rate_of == bag.name or arm.rates  # no arm keeps a rate that it did not choose
