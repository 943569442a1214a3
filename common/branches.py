"""What each of a module's parallel branches is worth: shares of its output and gradient, and the
loss without it. A module is whatever has `branches` whose outputs it concatenates.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import plotting
from common.data import Data, Loader
from common.evaluation import score
from common.experiments import Results, Trial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

Table = list[list[float]]  # (modules, branches)
SHARES = ("channels", "output", "gradient")


def modules_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "branches")]


def branch_shares(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Table]:
    """Shares of each branch in the channels, output and gradient of each module, for images x of
    the classes y; rows sum to 1.
    """
    model, seen = deepcopy(model).eval(), []  # a copy, so that hooks leave no trace
    for module in modules_of(model):
        module.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    loss = F.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, [output for _, output in seen])
    tables: dict[str, Table] = {what: [] for what in SHARES}
    for module, (read, _), gradient in zip(modules_of(model), seen, gradients):
        read = read.detach().requires_grad_()
        gives = [branch(read) for branch in module.branches]
        sizes = [output.shape[1] for output in gives]
        parts = zip(gives, gradient.split(sizes, dim=1))
        back = [torch.autograd.grad(output, read, part)[0] for output, part in parts]
        energy = ([x.square().sum().item() for x in maps] for maps in (gives, back))
        for what, row in zip(SHARES, (sizes, *energy)):
            tables[what].append([amount / sum(row) for amount in row])
    return tables


def silenced_losses(model: nn.Module, loader: Loader) -> Table:
    """By module and branch: what the loss on a split gains when the branch gives only zeros."""

    def without(branch: nn.Module) -> float:
        with branch.register_forward_hook(lambda *args: torch.zeros_like(args[-1])):
            return score(model, loader)[0]

    intact = score(model, loader)[0]
    return [[without(b) - intact for b in module.branches] for module in modules_of(model)]


def gradients(model: nn.Module, data: Data, loss_fn: nn.Module) -> dict[str, float | list[float]]:
    """Norms of an untrained net's gradient for one batch, divided by the loss: of the first layer,
    as a logarithm; of the stem and each module.
    """
    x, y = next(iter(data.train.batches()))
    loss = loss_fn(model.train()(x), y)
    loss.backward()
    first = next(model.parameters()).grad.norm()
    parts = [[p.grad for p in m.parameters()] for m in (model.stem, *modules_of(model))]
    norms = torch.stack([nn.utils.get_total_norm(grads) for grads in parts]) / loss
    name = "gradient over loss by module, at the start"
    return {"log gradient": (first / loss).log().item(), name: norms.tolist()}


def look_at_branches(
    trial: Trial, data: Data, branches: Sequence[str], watched: str
) -> dict[str, float | Table]:
    """The tables of shares and "loss added", and how well each share orders the losses; of the
    branch called `watched` its mean shares, and how much more it is missed than any other.
    """
    from scipy.stats import spearmanr

    tables = branch_shares(trial.model, *next(iter(data.val.batches())))
    tables["loss added"] = silenced_losses(trial.model, data.val)
    added = np.ravel(tables["loss added"])
    ranks = {f"rank by {s}": spearmanr(np.ravel(tables[s]), added).statistic for s in SHARES}
    mean = {what: dict(zip(branches, np.mean(table, axis=0))) for what, table in tables.items()}
    shares = {f"{watched} of {share}": mean[share][watched] for share in SHARES[1:]}
    more = mean["loss added"].pop(watched) - max(mean["loss added"].values())
    numbers = {**shares, f"{watched} missed more": more, **ranks}
    return {**{name: float(number) for name, number in numbers.items()}, **tables}


def draw_branches(results: Results, modules: Sequence[str], branches: Sequence[str]) -> Figure:
    """The tables of the only arm, mean over seeds."""
    (net,) = results.records
    figure, axes = plotting.panels(4, f"{net}'s branches, mean over seeds")
    for what, ax in zip((*SHARES, "loss added"), axes):
        table = np.mean([table for table in results.values(net, what) if table], axis=0)
        how = {"title": f"Share of the {what}", "percent": True, "limits": (0, 1)}
        if what == "loss added":
            how = {"title": "Loss added by silencing the branch", "fmt": "{:+.2f}"}
        plotting.heatmap(table, row_labels=modules, column_labels=branches, ax=ax, **how)
    return figure
