"""What each of a module's parallel branches is worth: shares of its output and gradient, and the
loss without it. A module is whatever has `branches` whose outputs it concatenates.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
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
        parts = gradient.split([output.shape[1] for output in gives], dim=1)
        back = [torch.autograd.grad(output, read, part)[0] for output, part in zip(gives, parts)]
        amounts = (
            [output.shape[1] for output in gives],
            [output.square().sum().item() for output in gives],
            [part.square().sum().item() for part in back],
        )
        for what, row in zip(SHARES, amounts):
            tables[what].append([amount / sum(row) for amount in row])
    return tables


def silenced_losses(model: nn.Module, loader: Loader) -> Table:
    """By module and branch: what the loss on a split gains when the branch gives only zeros."""

    def without(branch: nn.Module) -> float:
        hook = branch.register_forward_hook(lambda *args: torch.zeros_like(args[-1]))
        loss = score(model, loader)[0]
        hook.remove()
        return loss

    intact = score(model, loader)[0]
    return [[without(b) - intact for b in module.branches] for module in modules_of(model)]


def look_at_branches(trial: Trial, data: Data) -> dict[str, float | Table]:
    """The tables of shares and "loss added", and how well each share orders the losses."""
    tables = branch_shares(trial.model, *next(iter(data.val.batches())))
    tables["loss added"] = silenced_losses(trial.model, data.val)
    flat = {what: np.ravel(table) for what, table in tables.items()}
    ranks = {f"rank by {s}": spearmanr(flat[s], flat["loss added"]).statistic for s in SHARES}
    return {**{name: float(rank) for name, rank in ranks.items()}, **tables}


def draw_branches(results: Results, modules: Sequence[str], branches: Sequence[str]) -> Figure:
    """The tables of the only arm, mean over seeds."""
    (net,) = results.records
    figure, axes = plotting.panels(4, f"{net}'s branches, mean over seeds")
    draw = partial(plotting.heatmap, row_labels=modules, column_labels=branches)
    tables = {
        what: np.mean([table for table in results.values(net, what) if table], axis=0)
        for what in (*SHARES, "loss added")
    }
    for what, ax in zip(SHARES, axes):
        draw(tables[what], title=f"Share of the {what}", percent=True, limits=(0, 1), ax=ax)
    title = "Loss added by silencing the branch"
    draw(tables["loss added"], title=title, fmt="{:+.2f}", ax=axes[-1])
    return figure
