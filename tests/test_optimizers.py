"""Muon against a singular value decomposition, and against torch's SGD where it is SGD."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from common.config import TrainConfig
from common.optimizers import Muon, orthogonalise
from common.training import make_optimizer


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (32, 32)])
def test_orthogonalise_keeps_singular_vectors_and_evens_the_values(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.linspace(0.05, 1, shape[1]))
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert values.max() / values.min() > 5
    turned = u.T @ orthogonalise(matrix) @ vh.T  # diagonal if the singular vectors are the same
    evened = turned.diagonal()
    assert evened.max() < 1.25 and evened.max() / evened.min() < values.max() / values.min() / 2
    assert (turned - torch.diag(evened)).abs().max() < 1e-3


def small_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(1)).append(
        nn.Linear(8 * 6 * 6, 4)
    )


def test_muon_takes_orthogonal_steps_on_kernels_and_sgds_on_the_rest() -> None:
    config = TrainConfig(model="x", optimizer="muon", lr=0.2, weight_decay=0.01).resolve("digits")
    ours, reference = small_net(), small_net()
    optimizer = make_optimizer(ours, config)
    rest = [p for p in reference.parameters() if p.dim() != 4]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.01, "lr": 0.2 / 40},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0, "lr": 0.2 / 5},
    ]
    sgd = torch.optim.SGD(groups, lr=0.2, momentum=config.momentum, nesterov=True)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    for _ in range(3):
        reference[0].load_state_dict(ours[0].state_dict())  # the same kernel before each step
        kernel = ours[0].weight.detach().clone()
        for model, opt in ((ours, optimizer), (reference, sgd)):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        scaled = kernel * (8**0.5 / kernel.norm())
        step = (scaled - ours[0].weight.detach()).flatten(1) / config.lr
        values = torch.linalg.svdvals(step)
        assert values.min() > 0.4 and values.max() < 1.25
    for (name, a), (_, b) in zip(ours[1:].named_parameters(), reference[1:].named_parameters()):
        torch.testing.assert_close(a, b, msg=name)


def test_a_step_that_is_not_finite_leaves_the_weights_and_the_momentum_alone() -> None:
    net = small_net()
    optimizer = Muon([{"params": [net[0].weight], "orthogonal": True}], lr=0.1)
    before = net[0].weight.detach() * (8**0.5 / net[0].weight.detach().norm())
    net[0].weight.grad = torch.full_like(net[0].weight, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    torch.testing.assert_close(net[0].weight.detach(), before)
    assert optimizer.state[net[0].weight]["momentum_buffer"].abs().max() == 0


def test_muon_goes_on_from_its_saved_state_bit_for_bit() -> None:
    config = TrainConfig(model="x", optimizer="muon", lr=0.2).resolve("digits")
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    through = small_net()
    optimizer = make_optimizer(through, config)
    step(through, optimizer)
    resumed = small_net()
    resumed.load_state_dict(through.state_dict())
    again = make_optimizer(resumed, config)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, opt in ((through, optimizer), (resumed, again)):
        step(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), resumed.parameters()))
