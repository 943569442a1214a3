"""Muon: momentum whose every kernel is made orthogonal before it is taken as a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def orthogonalise(matrix: Tensor, steps: int = 3) -> Tensor:
    """Roughly the nearest orthogonal matrix: the same singular vectors, all values near 1.

    (M, N) -> (M, N). Newton and Schulz's iteration: a polynomial in X and X X^T changes nothing but
    the singular values, and this one, applied again and again, drives each from (0, 1] to between
    0.7 and 1.2. Its coefficients are steep at 0: a value grows by 3.4 each time while it is small;
    the price is that none settles at 1. Three steps are airbench's; for language models five are
    usual.  Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".

    >>> u = orthogonalise(torch.randn(8, 20, generator=torch.Generator().manual_seed(0)))
    >>> bool((torch.linalg.svdvals(u) - 0.95).abs().max() < 0.3)  # of 0.27 to 1
    True
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # X X^T is then the smaller of the two products
    x = x / (x.norm() + 1e-7)  # no singular value is above 1
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


class Muon(Optimizer):
    """Orthogonal steps for groups with `orthogonal: True`, SGD with Nesterov's momentum for others.

    A gradient has a few large directions, and SGD moves along little else. Made orthogonal, a step
    goes equally far in all of them. Each kernel (out, in, k, k) is taken as a matrix (out, in*k*k),
    and is scaled to norm sqrt(out) before each step: behind a BatchNorm a kernel's length changes
    nothing but the angle by which a step turns it.

    Source: Jordan et al. 2024; the scaling and the rates are those of Jordan's airbench, version
    "muon". NOTE: torch.optim.Muon takes matrices alone, no kernels, and no other group beside them.

    Args:
        groups: of parameters, each with `lr`, `momentum`, `weight_decay` and `orthogonal`.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.6) -> None:
        # As torch's own fused: with `found_inf` set, on a GPU, a step leaves the weights alone.
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "orthogonal": False}
        super().__init__(groups, {**defaults, "fused": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        bad = getattr(self, "found_inf", None)  # a number on the GPU: the host doesn't wait for it
        for group in self.param_groups:
            momentum, lr = group["momentum"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                grad = p.grad
                if bad is not None:
                    grad, lr = torch.where(bad > 0, 0.0, grad), lr * (1 - bad)
                if not group["orthogonal"]:
                    grad = grad.add(p, alpha=group["weight_decay"])
                memory = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                memory.mul_(momentum).add_(grad)
                step = grad.add(memory, alpha=momentum)  # Nesterov
                if group["orthogonal"]:
                    p.mul_(len(p) ** 0.5 / p.norm().clamp(min=1e-7))
                    step = orthogonalise(step.flatten(1)).view_as(p)
                p.sub_(lr * step)


def kernels_apart(groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    """Muon's groups of (matrices and kernels, vectors): kernels at `lr`, orthogonal and without
    decay, since their norm is set; biases and norms at a fifth of it; the classifier, whose inputs
    are many and large, at a fortieth.
    """
    weights, vectors = groups
    kernels = [p for p in weights["params"] if p.dim() == 4]
    matrices = [p for p in weights["params"] if p.dim() != 4]
    return [
        {"params": kernels, "orthogonal": True},
        {**weights, "params": matrices, "lr": lr / 40},
        {**vectors, "lr": lr / 5},
    ]
