"""The figures of a comparison: accuracy against cost, training side by side, the timeline."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from statistics import mean
from typing import TYPE_CHECKING

from common import plotting
from common.comparison.results import Candidate, Front

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from common.experiments import Results

# field -> words, and the unit of the axis
COSTS: dict[str, tuple[str, float]] = {
    "macs": ("million multiply-adds per image", 1e6),
    "params": ("million parameters", 1e6),
    "latency_ms": ("latency for one image, ms", 1),
}


def cost_figure(candidates: Sequence[Candidate], heading: str, front_of: Front) -> Figure:
    """Accuracy against multiply-adds, parameters and latency, the Pareto front drawn in each."""
    scored = [c for c in candidates if c.top1 is not None]
    costs = {k: v for k, v in COSTS.items() if any(getattr(c, k) is not None for c in scored)}
    figure, axes = plotting.panels(len(costs), heading, columns=len(costs), size=(7.4, 6.2))
    for (cost, (words, unit)), ax in zip(costs.items(), axes):
        known = [c for c in scored if getattr(c, cost) is not None]
        front = [c.model for c in front_of(known, cost)]
        plotting.scatter(
            [(c.model, getattr(c, cost) / unit, c.top1) for c in known],
            f"{words} (log scale)",
            "top-1 accuracy",
            f"{len(front)} of {len(known)} on the front",
            log_x=True,
            front=front,
            percent=True,
            ax=ax,
        )
    return figure


def curves_figure(results: Results) -> Figure:
    """Validation accuracy by epoch, one line for each model, the mean over its seeds."""
    runs = {
        model: [values for values in results.values(model, "val_by_epoch") if values]
        for model in results.records
    }
    seeds = max(map(len, runs.values()))
    means = {model: [mean(epoch) for epoch in zip(*of)] for model, of in runs.items() if of}
    title = f"Validation accuracy, mean of {seeds} seeds" if seeds > 1 else "Validation accuracy"
    (ax,) = plotting.panels(1, size=(10, 6.4))[1]
    return plotting.curves(means, "epoch", "validation accuracy", title, percent=True, ax=ax)


def timeline_figure(
    candidates: Sequence[Candidate], family: Callable[[str], Hashable], front_of: Front
) -> Figure:
    """Left: the best of each family by year; `family` gives what is equal for the names of one.
    Right: the least it cost, by year, to reach 70%.
    """
    published = [c for c in candidates if c.top1 is not None and c.year]
    best = {family(c.model): c for c in sorted(published, key=lambda c: c.top1)}
    figure, (left, right) = plotting.panels(2, size=(8.6, 6))
    plotting.scatter(
        [(c.model, c.year, c.top1) for c in best.values()],
        "year of the paper",
        "ImageNet top-1 accuracy",
        "The best of each family; joined: better than all before",
        front=[c.model for c in front_of(best.values(), "year")],
        percent=True,
        ax=left,
    )
    cheapest: dict[str, float] = {}
    least = float("inf")
    for c in sorted(published, key=lambda c: (c.year, c.macs)):
        if c.top1 >= 0.70 and c.macs < least:
            least = c.macs
            cheapest[f"{c.year}: {c.model}"] = c.macs / 1e9
    plotting.bars(
        cheapest,
        "billion multiply-adds for one image",
        "The price of 70%: the cheapest network so far that reaches it",
        ax=right,
    )
    return figure
