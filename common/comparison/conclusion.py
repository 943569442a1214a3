"""The end of a comparison: its numbers in sentences, tables, figures and one page."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from operator import attrgetter
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from common import plotting
from common.comparison.entries import chosen_names, without_aux
from common.comparison.imagenet import NEWER, evaluate_imagenet, published, with_newer_weights
from common.comparison.page import comparison_page
from common.comparison.results import (
    MARGIN,
    Candidate,
    Front,
    Table,
    choose,
    describe_choice,
    judge_pairs,
    markdown_table,
    parse_constraints,
    percent,
    si,
    summarise,
    tied_with_best,
    write_tables,
)
from common.comparison.sweeps import FOLDED, MakeEntry
from common.engine.device import describe, pick_device
from common.engine.errors import UserError
from common.engine.files import Store, write_atomically
from common.lessons import get_model
from common.pretrained import load_pretrained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from common.config import TrainConfig
    from common.experiments import Results
    from common.runs import Run


# ---------------------------------------------------------------------------------------- sentences


def front_verdict(rows: list[Candidate], front: Front) -> str:
    """Which networks are beaten by no other, by each cost that is known."""
    costs = {"macs": "multiply-adds", "params": "parameters", "latency_ms": "latency here"}
    told, fronts = [], []
    for cost, words in costs.items():
        if names := {c.model for c in front(rows, cost)}:
            known = sum(c.top1 is not None and getattr(c, cost) is not None for c in rows)
            told.append(f"{len(names)} of {known} by {words}")
            fronts.append(names)
    named = [c.model for c in rows if all(c.model in names for names in fronts)]
    return f"on the Pareto front: {', '.join(told)}; on every front: {', '.join(named) or 'none'}"


def trained_verdict(rows: list[Candidate], front: Front) -> str:
    """Which network has the highest mean, and from which others the seeds can tell it."""
    ranked = sorted((c for c in rows if c.top1 is not None), key=lambda c: -c.top1)
    if not ranked:
        return "every training failed; try a smaller --lr"
    best, *others = ranked
    told = [f"{best.model} has the highest mean, {percent(best.top1)}"]
    if best.seeds < 2:
        told.append("one seed decides nothing: use --seeds 3")
    else:
        verdicts = judge_pairs(rows)
        pairs = {c.model: verdicts[best.model, c.model] for c in others}
        points = f"{100 * MARGIN:g} points"
        for outcome, words in (
            ("holds", f"it is more than {points} better than"),
            ("fails", f"at most {points} worse:"),
            ("undecided", "undecided:"),
        ):
            if names := [model for model, pair in pairs.items() if pair.outcome == outcome]:
                told.append(f"{words} {', '.join(names)}")
        if enough := [pair.seeds_to_decide for pair in pairs.values() if pair.seeds_to_decide]:
            told.append(f"about {min(enough)} seeds would decide one of these")
        thrifty = min(tied_with_best(ranked, verdicts), key=lambda c: c.macs)
        if thrifty is not best:
            told.append(
                f"the cheapest that it is not shown to beat is {thrifty.model}: "
                f"{si(thrifty.macs)} multiply-adds against {si(best.macs)}"
            )
    told.append(front_verdict(rows, front))
    if failed := [c.model for c in rows if c.top1 is None]:
        told.append(f"failed under this recipe, which is no verdict on them: {', '.join(failed)}")
    return "; ".join(told)


def matched_verdict(rows: list[Candidate], by: str) -> str:
    """How equal the sizes are that should be: `by` is "params" or "macs", what was matched."""
    least, most = min(rows, key=attrgetter(by)), max(rows, key=attrgetter(by))
    what = {"params": "parameters", "macs": "multiply-adds"}[by]
    return (
        f"matched by {what}: from {si(getattr(least, by))} ({least.model}) to "
        f"{si(getattr(most, by))} ({most.model}), as near as whole channels allow"
    )


# ------------------------------------------------------------------------------------------ figures

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


# ------------------------------------------------------------------------------------ all of it


def conclude(
    config: Any,
    run: Run,
    measured: tuple[list[Candidate], str],
    own: tuple[list[Candidate], str],
    ways: list[Candidate],
    trained: Results | None,
    limit: float,
    front: Front,
    era: Callable[[str], Hashable],
) -> list[Table]:
    """All that was counted, timed and trained, as tables, verdicts and figures.

    Args:
        measured: ImageNet's models, and a sentence on how steady their order is; `own`: the same of
            the models that are trained here.
        limit: multiply-adds above which no pass was timed.
        era: of a model's name; equal for models of one family.
    """
    device = describe(pick_device(config.device))
    where = f"Latency is of one image, on {device}, torch {torch.__version__}"
    tables, verdicts, figures = [], [], {}
    (large, large_order), (rows, order) = measured, own
    if large:
        every = with_newer_weights(large)
        note = f"Accuracy as published by torchvision; {NEWER}. {where}; {large_order}."
        if limit < math.inf:
            note += f" Passes of more than {limit / 1e9:g} GMACs were not timed (--pass-limit)."
        by = f"Ranked by the accuracy that torchvision published; {NEWER}."
        tables.append(Table("ImageNet", note, every, by))
        if any(c.top1 for c in every):
            verdicts.append(f"ImageNet as published, {NEWER}: {front_verdict(every, front)}")
            figures["imagenet_cost"] = cost_figure(every, "ImageNet: beaten by no other", front)
            if config.model == "all":
                figures["timeline"] = timeline_figure(large, era, front)
    by = ""
    if trained:
        rows, seeds = [summarise(r, trained.records[r.model]) for r in rows], config.seeds
        epochs = f"{config.epochs} epoch{'s' * (config.epochs > 1)}"
        budget = f"{config.budget} of training" if config.budget else epochs
        spread = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
        by = f"Test accuracy after {budget}, {spread}."
        verdicts += [f"{config.dataset}: {trained_verdict(rows, front)}", *trained.edges()]
        if any(c.top1 for c in rows):
            heading = f"{config.dataset}: each at its own best rate"
            figures["trained_cost"] = cost_figure(rows, heading, front)
            figures["training_curves"] = curves_figure(trained)
    if config.experiment:
        verdicts.append(matched_verdict(rows, config.match))
    note = f"{by or 'Not trained.'} {where}; {order}."
    tables.append(Table(f"{config.dataset}, {config.image_size} px", note, rows, by))
    if ways:
        note = f"{where}. Where it says folded, {FOLDED}."
        tables.append(Table("The same network, several ways", note, ways))
    return present(config, run, tables, verdicts, figures, front)


def present(
    config: TrainConfig,
    run: Run,
    tables: list[Table],
    verdicts: list[str],
    figures: dict[str, Figure],
    front: Front,
) -> list[Table]:
    """Write comparison.md, .csv and .json, the figures and report.html; print what they say. What
    meets `--choose` is ranked for each table with accuracies.
    """
    choices, constraints = [], parse_constraints(config.choose)
    for table in tables:
        if constraints and any(c.top1 is not None for c in table.candidates):
            told = describe_choice(choose(table.candidates, constraints))
            choices.append(f"{config.choose}, {table.title}. {table.ranked_by}\n{told}")
    if constraints and not choices:
        choices.append(
            f"{config.choose}: no accuracy is known of these models, so none can be chosen; train "
            "them first, without --choose, and ask with --resume RUN --choose"
        )
    title = f"Model comparison: {config.experiment or config.dataset}"
    write_tables(run.folder, title, tables)
    pictures = {name: run.figure(name, figure).read_bytes() for name, figure in figures.items()}
    page = comparison_page(title, tables, front, pictures, "\n\n".join([*choices, *verdicts]))
    write_atomically(run.folder / "report.html", page)
    print(*(f"\n{choice}" for choice in choices), sep="\n")
    for table in tables:
        print(f"\n{table.title}. {table.note}\n\n{markdown_table(table.candidates)}")
    print("", *(f"verdict    {sentence}" for sentence in verdicts), sep="\n")
    print(f"report     {run.folder / 'report.html'}{run.where()}", flush=True)
    return tables


def reproduce(
    config: TrainConfig, device: torch.device, run: Run, entry: MakeEntry, front: Front
) -> list[Table]:
    """`--eval-imagenet DIR --pretrained`: official weights in our models, on the real images."""
    store = Store(run.folder / "imagenet.json", {"folder": config.eval_imagenet}, tell=run.resumed)
    rows = []
    for name in chosen_names(config.model, list(published())):
        if name not in published():
            raise UserError(f"--model {name}: torchvision has no weights for it")
        known = published()[name]
        if store.get(name) is None:
            model = load_pretrained(get_model(name)(), name).to(device)
            top1, top5, images = evaluate_imagenet(model, name, config)
            counts = entry("ImageNet", name, without_aux(get_model(name)), known.crop).candidate
            source = f"measured on {images:,} images"
            store.put(name, replace(counts, top1=top1, top5=top5, source=source))
        row = Candidate(**store.get(name))
        print(
            f"{name:<20} top-1 {percent(row.top1, 3)} (published {known.top1:.3f} %)  "
            f"top-5 {percent(row.top5, 3)} (published {known.top5:.3f} %)",
            flush=True,
        )
        rows.append(row)
    off, worst = max((abs(100 * c.top1 - published()[c.model].top1), c.model) for c in rows)
    verdict = f"the largest distance from the published top-1 is {off:.3f} points ({worst})"
    note = f"Official weights in our models, {rows[0].source}, on {describe(device)}."
    figures = {"imagenet_cost": cost_figure(rows, "ImageNet, measured", front)}
    table = Table("ImageNet, measured", note, rows)
    return present(config, run, [table], [verdict], figures, front)
