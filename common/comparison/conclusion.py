"""The end of a comparison: its numbers in sentences, tables, figures and one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from common.comparison.entries import chosen_names, without_aux
from common.comparison.figures import cost_figure
from common.comparison.imagenet import evaluate_imagenet, load_official, published
from common.comparison.page import comparison_page
from common.comparison.results import (
    MARGIN,
    Candidate,
    Constraint,
    Table,
    choose,
    describe_choice,
    judge_pairs,
    markdown_table,
    pareto_front,
    percent,
    si,
    tied_with_best,
    write_tables,
)
from common.engine.device import describe
from common.engine.errors import UserError
from common.engine.files import write_atomically
from common.engine.overview import write_index
from common.engine.store import Store
from common.lessons import get_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from common.comparison.sweeps import Entry
    from common.config import TrainConfig
    from common.runs import Run


def front_verdict(rows: list[Candidate]) -> str:
    """Which networks are beaten by no other, by each cost that is known."""
    costs = {"macs": "multiply-adds", "params": "parameters", "latency_ms": "latency here"}
    fronts = {words: {c.model for c in pareto_front(rows, cost)} for cost, words in costs.items()}
    fronts = {words: names for words, names in fronts.items() if names}
    scored = [c for c in rows if c.top1 is not None]
    known = {words: sum(getattr(c, k) is not None for c in scored) for k, words in costs.items()}
    always = set.intersection(*fronts.values()) if fronts else set()
    told = [f"{len(names)} of {known[words]} by {words}" for words, names in fronts.items()]
    named = ", ".join(c.model for c in rows if c.model in always)
    return f"on the Pareto front: {', '.join(told)}; on every front: {named or 'none'}"


def trained_verdict(rows: list[Candidate]) -> str:
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
        open_pairs = [pair for pair in pairs.values() if pair.outcome == "undecided"]
        if enough := [pair.seeds_to_decide for pair in open_pairs if pair.seeds_to_decide]:
            told.append(f"about {min(enough)} seeds would decide one of these")
        tied = tied_with_best(ranked, verdicts)
        thrifty = min(tied, key=lambda c: c.macs)
        if thrifty is not best:
            told.append(
                f"the cheapest that it is not shown to beat is {thrifty.model}: "
                f"{si(thrifty.macs)} multiply-adds against {si(best.macs)}"
            )
    told.append(front_verdict(rows))
    if failed := [c.model for c in rows if c.top1 is None]:
        told.append(f"failed under this recipe, which is no verdict on them: {', '.join(failed)}")
    return "; ".join(told)


def matched_verdict(rows: list[Candidate], by: str) -> str:
    """How equal the sizes are that should be.

    Args:
        by: "params" or "macs", what was matched.
    """
    sizes = {c.model: c.params if by == "params" else c.macs for c in rows}
    least, most = min(sizes, key=sizes.get), max(sizes, key=sizes.get)
    what = "parameters" if by == "params" else "multiply-adds"
    return (
        f"matched by {what}: from {si(sizes[least])} ({least}) to {si(sizes[most])} ({most}), "
        "as near as whole channels allow"
    )


def present(
    config: TrainConfig,
    run: Run,
    tables: list[Table],
    verdicts: list[str],
    figures: dict[str, Figure],
    constraints: Sequence[Constraint] = (),
) -> list[Table]:
    """Write comparison.md, .csv and .json, the figures and report.html; print what they say.

    Args:
        constraints: of `--choose`; what meets them is ranked for each table with accuracies.
    """
    choices = []
    for table in tables:
        if constraints and any(c.top1 is not None for c in table.candidates):
            told = describe_choice(choose(table.candidates, constraints))
            choices.append(f"{config.choose}, {table.title}:\n{told}")
    title = f"Model comparison: {config.experiment or config.dataset}"
    write_tables(run.folder, title, tables)
    pictures = {name: run.figure(name, figure).read_bytes() for name, figure in figures.items()}
    page = comparison_page(title, tables, pictures, "\n\n".join([*choices, *verdicts]))
    write_atomically(run.folder / "report.html", page)
    print(*(f"\n{choice}" for choice in choices), sep="\n")
    for table in tables:
        print(f"\n{table.title}. {table.note}\n\n{markdown_table(table.candidates)}")
    print("", *(f"verdict    {sentence}" for sentence in verdicts), sep="\n")
    index = write_index(run.folder.parent.parent)
    print(f"report     {run.folder / 'report.html'}, all runs: {index}", flush=True)
    return tables


def reproduce(
    config: TrainConfig,
    device: torch.device,
    run: Run,
    entry: Callable[[str, str, Callable[..., nn.Module], int], Entry],
) -> list[Table]:
    """`--eval-imagenet DIR --pretrained`: official weights in our models, on the real images.

    Args:
        entry: what the lesson can say of a model: of its task, name, builder and image size.
    """
    store = Store(run.folder / "imagenet.json", {"folder": config.eval_imagenet}, tell=run.resumed)
    rows = []
    for name in chosen_names(config.model, list(published())):
        if name not in published():
            raise UserError(f"--model {name}: torchvision has no weights for it")
        row = published()[name]
        if store.get(name) is None:
            model = load_official(get_model(name)(), name).to(device)
            top1, top5, images = evaluate_imagenet(model, name, config)
            counts = entry("ImageNet", name, without_aux(get_model(name)), row.crop).candidate
            source = f"measured on {images:,} images"
            store.put(name, replace(counts, top1=top1, top5=top5, source=source))
        rows.append(Candidate(**store.get(name)))
        print(
            f"{name:<20} top-1 {percent(rows[-1].top1, 3)} (published {row.top1:.3f} %)  "
            f"top-5 {percent(rows[-1].top5, 3)} (published {row.top5:.3f} %)",
            flush=True,
        )
    off = {c.model: abs(100 * c.top1 - published()[c.model].top1) for c in rows}
    worst = max(off, key=off.get)
    verdict = f"the largest distance from the published top-1 is {off[worst]:.3f} points ({worst})"
    note = f"Official weights in our models, {rows[0].source}, on {describe(device)}."
    figures = {"imagenet_cost": cost_figure(rows, "ImageNet, measured")}
    return present(config, run, [Table("ImageNet, measured", note, rows)], [verdict], figures)
