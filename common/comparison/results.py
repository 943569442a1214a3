"""Models side by side, as plain records: the Pareto front, constraints, tables, kept results."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from common.engine.errors import UserError, unknown
from common.engine.files import write_atomically, write_csv, write_json
from common.engine.verdicts import OverSeeds, Verdict, judge


@dataclass(frozen=True)
class Candidate:
    """One model of a comparison: what it is, costs and achieves. None: not known, not measured."""

    task: str  # what the accuracy is for: "ImageNet", "digits"
    model: str
    lesson: str  # its number, "01"
    year: int | None  # of the paper; None: there is none
    input_px: int  # side of the square image that all figures are for
    params: int
    macs: int  # multiply-adds for one image
    thop_macs: int | None = None  # the same by thop, for comparison
    thop_note: str = ""  # where the two differ
    size_mb: float = 0.0  # of the saved float32 weights
    latency_ms: float | None = None  # median for one image
    latency_iqr_ms: float | None = None
    batch_size: int | None = None  # of the two figures below
    images_per_second: float | None = None
    memory_mb: float | None = None  # peak during inference
    device: str = ""
    dtype: str = ""
    top1: float | None = None  # fraction in [0, 1]
    top1_std: float | None = None  # over seeds
    top5: float | None = None
    seeds: int = 0  # 0: published, not measured here
    top1_by_seed: list[float] = field(default_factory=list)
    test_images: int = 0  # that each of these is a share of; 0: not known
    epochs: int | None = None
    lr: float | None = None  # peak, chosen for this model
    train_seconds: float | None = None  # mean over seeds
    source: str = ""  # of the accuracy


# lesson 7's `pareto_front`: candidates and the field to keep low to those that no other beats
Front = Callable[[Iterable[Candidate], str], list[Candidate]]

# ------------------------------------------------------------------------- "params<5M,latency<20ms"


class Quantity(NamedTuple):
    """A word of the constraint language: the field it reads, and what each unit multiplies by."""

    field: str
    units: dict[str, float]


COUNT = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}
BYTES = {"KB": 1e-3, "MB": 1, "GB": 1e3}
SHARE = {"%": 0.01, "": 0.01}

QUANTITIES: dict[str, Quantity] = {
    "params": Quantity("params", COUNT),
    "macs": Quantity("macs", COUNT),
    "size": Quantity("size_mb", BYTES),
    "latency": Quantity("latency_ms", {"us": 1e-3, "ms": 1, "s": 1e3}),
    "throughput": Quantity("images_per_second", {"/s": 1, "": 1}),
    "memory": Quantity("memory_mb", BYTES),
    "top1": Quantity("top1", SHARE),
    "top5": Quantity("top5", SHARE),
    "px": Quantity("input_px", {"": 1, "px": 1}),
    "year": Quantity("year", {"": 1}),
}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Constraint:
    """One condition, such as latency<20ms."""

    text: str
    field: str
    compare: Callable[[float, float], bool]
    limit: float  # in the unit of the field

    def met_by(self, candidate: Candidate) -> bool:
        """False too where the candidate's figure is not known."""
        value = getattr(candidate, self.field)
        return value is not None and self.compare(value, self.limit)


def parse_constraints(text: str | None) -> list[Constraint]:
    """Read "params<5M,latency<20ms"; nothing where nothing is asked.

    >>> [c] = parse_constraints("latency <= 0.5s")
    >>> c.field, c.limit
    ('latency_ms', 500.0)

    Raises:
        UserError: names the first part that is no constraint, the unknown word, or the wrong unit.
    """
    constraints: list[Constraint] = []
    if text is None:
        return constraints
    parts = text.split(",")
    for part in parts[:-1] if len(parts) > 1 and not parts[-1].strip() else parts:
        match = re.fullmatch(
            r"\s*(\w+)\s*(<=|>=|<|>)\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(\S*)\s*", part
        )
        if not match:
            raise UserError(
                f"--choose: {part.strip()!r} is no constraint; write a word, <, <=, > or >=, a "
                "number and its unit, such as params<5M, and a comma between two"
            )
        word, sign, number, unit = match.groups()
        word = word.lower()
        if word not in QUANTITIES:
            raise unknown("word in --choose", word, QUANTITIES)
        quantity = QUANTITIES[word]
        unit = {u.lower(): u for u in quantity.units}.get(unit.lower(), unit)
        if unit not in quantity.units:
            units = ", ".join(u or "none" for u in quantity.units)
            said = f"unknown unit {unit!r} of {word}" if unit else f"{word} needs a unit"
            raise UserError(f"--choose: {part.strip()}: {said}; units of {word}: {units}")
        limit = float(number) * quantity.units[unit]
        if quantity.units is SHARE and not unit and float(number) <= 1:
            limit = float(number)  # top1>0.75 is 75%
        if quantity.units is SHARE and limit > 1:
            raise UserError(f"--choose: {part.strip()}: no accuracy is above 100%")
        constraints.append(Constraint(part.strip(), quantity.field, COMPARISONS[sign], limit))
    return constraints


@dataclass(frozen=True)
class Cost:
    """What one constraint takes away: the best model with all, and with all but this one."""

    constraint: str
    points: (
        float | None
    )  # of top-1, a fraction; None where nothing fits with it, or nothing even without it
    without: Candidate | None  # the best model if this constraint were dropped
    tied: bool = False  # the seeds can't tell the two apart


@dataclass(frozen=True)
class Choice:
    """What fits, best first, and what each constraint costs."""

    ranked: list[Candidate]
    costs: list[Cost]
    best_of_all: Candidate | None
    tied: list[str]  # models that the seeds can't tell from the first of `ranked`, and itself
    unmeasured: list[str]  # models left out because a figure that is asked for was not measured
    unscored: list[str]  # and because no accuracy is known
    best_tied: bool = False  # the seeds can't tell the first of `ranked` from `best_of_all`


def choose(candidates: Sequence[Candidate], constraints: Sequence[Constraint]) -> Choice:
    """Rank what meets every constraint by top-1; of two equals the cheaper first. A tie in the
    verdict (`judge_pairs`) is a tie here.
    """
    verdicts = judge_pairs(candidates)

    def ranked(under: Sequence[Constraint]) -> list[Candidate]:
        fits = [c for c in candidates if c.top1 is not None and all(k.met_by(c) for k in under)]
        return sorted(fits, key=lambda c: (-c.top1, c.macs))

    chosen = ranked(constraints)
    costs, best_of_all = [], next(iter(ranked([])), None)

    def level(best: Candidate | None) -> bool:
        return bool(chosen) and chosen[0] in tied_with_best([best, chosen[0]], verdicts)[1:]

    for i, constraint in enumerate(constraints):
        relaxed = ranked([*constraints[:i], *constraints[i + 1 :]])
        points = relaxed[0].top1 - chosen[0].top1 if chosen else None
        best = relaxed[0] if relaxed else None
        costs.append(Cost(constraint.text, points, best, level(best)))
    unmeasured = [
        c.model for c in candidates if any(getattr(c, k.field) is None for k in constraints)
    ]
    tied = [c.model for c in tied_with_best(chosen, verdicts)]
    unscored = [c.model for c in candidates if c.top1 is None]
    return Choice(chosen, costs, best_of_all, tied, unmeasured, unscored, level(best_of_all))


def describe_choice(choice: Choice, limit: int = 10) -> str:
    """The ranking and the price of each constraint, as lines to print."""
    lines = []
    for c in choice.ranked[:limit]:
        better = sum(other.top1 > c.top1 for other in choice.ranked)
        rank = 1 if c.model in choice.tied else 1 + better
        latency = "" if c.latency_ms is None else f"{c.latency_ms:9.1f} ms"
        lines.append(
            f"{rank:3}. {c.model:<22}{percent(c.top1):>8}{si(c.params):>9} params"
            f"{si(c.macs):>9} MACs{latency}"
        )
    if len(choice.ranked) > limit:
        lines.append(f"     and {len(choice.ranked) - limit} more")
    if not choice.ranked:
        lines.append("Nothing fits.")
    if len(choice.tied) > 1:
        first = [c for c in choice.ranked if c.model in choice.tied]
        cheapest = min(first, key=lambda c: c.macs).model
        lines.append(
            f"{len(first)} share the first place: the seeds can't tell them apart; the cheapest of "
            f"them is {cheapest}"
        )
    for cost in choice.costs:
        if cost.without is None:
            told = "nothing would fit without it either"
        elif cost.points is None:
            told = f"without it {cost.without.model} would fit ({percent(cost.without.top1)})"
        elif cost.without == choice.ranked[0]:
            told = "costs nothing: the same model wins without it"
        elif cost.tied:
            told = (
                f"costs nothing that the seeds can tell: without it {cost.without.model} "
                f"({percent(cost.without.top1)})"
            )
        else:
            told = (
                f"costs {100 * cost.points:.2f} points: without it {cost.without.model} "
                f"({percent(cost.without.top1)})"
            )
        lines.append(f"{cost.constraint}: {told}")
    if choice.ranked and choice.best_of_all:
        lost = 100 * (choice.best_of_all.top1 - choice.ranked[0].top1)
        price = "nothing that the seeds can tell" if choice.best_tied else f"{lost:.2f} points"
        lines.append(
            f"All together cost {price} against {choice.best_of_all.model} "
            f"({percent(choice.best_of_all.top1)}), the best of all."
        )
    if choice.unmeasured:
        lines.append(f"Not measured, so left out: {', '.join(choice.unmeasured)}")
    if choice.unscored:
        lines.append(f"No accuracy is known, so left out: {', '.join(choice.unscored)}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- the tables


def si(value: float) -> str:
    """Three significant digits and a prefix.

    >>> [si(v) for v in (812, 61100840, 1_814_000_000, 999_999, 0)]
    ['812', '61.1M', '1.81G', '1M', '0']
    """
    value = float(f"{value:.3g}")
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def percent(share: float | None, digits: int = 2) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def decimal(value: float | None) -> str:
    """As many decimals as the size deserves.

    >>> [decimal(v) for v in (0.1234, 12.34, 1234.5, None)]
    ['0.123', '12.3', '1234', '']
    """
    if value is None:
        return ""
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


class Column(NamedTuple):
    """One column of the table: its head, how a candidate's cell reads, and what it sorts by."""

    head: str
    cell: Callable[[Candidate], str]
    key: Callable[[Candidate], float | str | None]


def _accuracy(c: Candidate) -> str:
    return percent(c.top1) + (f" ± {100 * c.top1_std:.2f}" if c.top1_std is not None else "")


COLUMNS: list[Column] = [
    Column("model", lambda c: c.model, lambda c: c.model),
    Column("lesson", lambda c: c.lesson, lambda c: c.lesson),
    Column("year", lambda c: str(c.year or ""), lambda c: c.year),
    Column("px", lambda c: str(c.input_px), lambda c: c.input_px),
    Column("top-1", _accuracy, lambda c: c.top1),
    Column("top-5", lambda c: percent(c.top5), lambda c: c.top5),
    Column("params", lambda c: si(c.params), lambda c: c.params),
    Column("MACs", lambda c: si(c.macs), lambda c: c.macs),
    Column(
        "MACs by thop",
        lambda c: "" if c.thop_macs is None else si(c.thop_macs),
        lambda c: c.thop_macs,
    ),
    Column("file MB", lambda c: decimal(c.size_mb), lambda c: c.size_mb),
    Column("latency ms", lambda c: decimal(c.latency_ms), lambda c: c.latency_ms),
    Column("IQR ms", lambda c: decimal(c.latency_iqr_ms), lambda c: c.latency_iqr_ms),
    Column("images/s", lambda c: decimal(c.images_per_second), lambda c: c.images_per_second),
    Column("at batch", lambda c: str(c.batch_size or ""), lambda c: c.batch_size),
    Column("format", lambda c: c.dtype, lambda c: c.dtype or None),
    Column("peak MB", lambda c: decimal(c.memory_mb), lambda c: c.memory_mb),
    Column("epochs", lambda c: str(c.epochs or ""), lambda c: c.epochs),
    Column("rate", lambda c: "" if c.lr is None else f"{c.lr:.3g}", lambda c: c.lr),
    Column("training s", lambda c: decimal(c.train_seconds), lambda c: c.train_seconds),
]


def filled_columns(candidates: Sequence[Candidate]) -> list[Column]:
    """The columns that say something about at least one of them."""
    return [column for column in COLUMNS if any(column.cell(c) for c in candidates)]


@dataclass(frozen=True)
class Table:
    """Candidates that may be compared with each other: same task, same accuracy, same machine."""

    title: str
    note: str  # where the figures come from
    candidates: list[Candidate]
    ranked_by: str = ""  # what the accuracies are of


def markdown_table(candidates: Sequence[Candidate]) -> str:
    columns = filled_columns(candidates)
    rows = [[column.cell(c) for column in columns] for c in candidates]
    heads = [column.head for column in columns]
    widths = [max(map(len, cells)) for cells in zip(heads, *rows)]
    lines = [
        heads,
        ["-" * (width - 1) + ":" if i else "-" * width for i, width in enumerate(widths)],
        *rows,
    ]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))
        )
        + " |"
        for line in lines
    )


def write_tables(folder: Path, title: str, tables: Sequence[Table]) -> None:
    """comparison.md to read, comparison.csv for a spreadsheet, comparison.json for a program."""
    parts = [f"# {title}"]
    for table in tables:
        parts += [f"## {table.title}", table.note, markdown_table(table.candidates)]
        notes = [f"- {c.model}: {c.thop_note}" for c in table.candidates if c.thop_note]
        if notes:
            parts += ["Where thop counts otherwise:", "\n".join(notes)]
    write_atomically(folder / "comparison.md", "\n\n".join(parts) + "\n")
    write_csv(folder / "comparison.csv", [c for table in tables for c in table.candidates])
    write_json(
        folder / "comparison.json", {"title": title, "tables": [asdict(table) for table in tables]}
    )


# -------------------------------------------------------------------- trainings, and what they say


def summarise(candidate: Candidate, records: Sequence[Mapping[str, Any]]) -> Candidate:
    """The candidate with the mean and the standard deviation (n - 1) of its trainings, records of
    the harness.

    If one seed failed the model has no accuracy: the mean of the others would flatter it.
    """
    whole = not any(record["failure"] for record in records)
    scores = [record["test_top1"] for record in records] if whole else []
    return replace(
        candidate,
        top1=mean(scores) if scores else None,
        top1_std=stdev(scores) if len(scores) > 1 else None,
        top5=mean(record["test_top5"] for record in records) if scores else None,
        seeds=len(records),
        top1_by_seed=scores,
        test_images=records[0]["test_images"],
        epochs=len(records[0].get("losses", [])) or None,
        lr=records[0]["lr"],
        train_seconds=mean(record.get("seconds", 0.0) for record in records),
    )


MARGIN = 0.005  # half a point: about two of the 359 test images of digits


def judge_pairs(candidates: Sequence[Candidate]) -> dict[tuple[str, str], Verdict]:
    """For each pair of trained models, the higher mean first: is the first more than MARGIN ahead?

    *holds*: it is. *fails*: the second is at most that much worse. *undecided*: more seeds, or no
    difference. One seed decides nothing.

    NOTE: all pairs are judged, though only those with the best may be asked for: the best of many
    equals is picked for its luck, and Holm's rule has to pay for the picking. Without that, one of
    ten equals is called worse in 12% of comparisons with five seeds.
    """
    trained = [c for c in candidates if c.top1_by_seed]
    pairs = [(a, b) for a, b in combinations(sorted(trained, key=lambda c: -c.top1), 2)]
    evidence = [
        OverSeeds(
            [x - y for x, y in zip(a.top1_by_seed, b.top1_by_seed, strict=True)],
            resolution=1 / a.test_images if a.test_images else 0.0,
        )
        for a, b in pairs
    ]
    verdicts = judge(evidence, [MARGIN] * len(pairs))
    return {(a.model, b.model): verdict for (a, b), verdict in zip(pairs, verdicts)}


def tied_with_best(
    ranked: Sequence[Candidate], verdicts: dict[tuple[str, str], Verdict]
) -> list[Candidate]:
    """The first of `ranked` and those that it isn't shown to be better than. A published accuracy
    has no seeds and stands for itself.

    Args:
        ranked: by falling accuracy.
        verdicts: of `judge_pairs`.
    """
    pairs = [verdicts.get((ranked[0].model, c.model)) for c in ranked[1:]]
    level = [c for c, pair in zip(ranked[1:], pairs) if pair and pair.outcome != "holds"]
    return [*ranked[:1], *level]


@dataclass(frozen=True)
class Budget:
    """How long each model is trained: a number of epochs, or of seconds."""

    epochs: int | None = None
    seconds: float | None = None


def parse_budget(text: str) -> Budget:
    """Read "10" or "10 epochs", "90s", "2m".

    >>> parse_budget("10"), parse_budget("1.5m")
    (Budget(epochs=10, seconds=None), Budget(epochs=None, seconds=90.0))

    Raises:
        UserError: anything else, or nothing left to train with.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*(epochs?|s|m|min|h|)\s*", text)
    wrong = UserError(
        f"--budget {text}: epochs (10) or time per training (90s, 2m, 1h), more than none; 10,000 "
        "epochs or 1,000 hours at most"
    )
    if not match or float(match[1]) == 0:
        raise wrong
    number, unit = float(match[1]), match[2]
    if unit in ("", "epoch", "epochs"):
        if number != int(number) or number > 10_000:
            raise wrong
        return Budget(epochs=int(number))
    seconds = number * {"s": 1, "m": 60, "min": 60, "h": 3600}[unit]
    if seconds > 3.6e6:
        raise wrong
    return Budget(seconds=seconds)


def parse_size(text: str, flag: str) -> float:
    """Read "0.3M".

    >>> parse_size("0.3M", "--match-to")
    300000.0
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMG]?)\s*", text)
    if not match or float(match[1]) == 0:
        raise UserError(f"{flag} {text}: a number with K, M or G, such as 0.3M")
    size = float(match[1]) * COUNT[match[2]]
    if not 1e4 <= size <= 1e11:
        raise UserError(f"{flag} {text}: no net of the course is made that size; 10K to 100G are")
    return size
