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
    test_images: int = 0  # that each of these is a share of
    epochs: int | None = None
    lr: float | None = None  # peak, chosen for this model
    train_seconds: float | None = None  # mean over seeds
    source: str = ""  # of the accuracy


# lesson 7's `pareto_front`: candidates and the field to keep low to those that no other beats
Front = Callable[[Iterable[Candidate], str], list[Candidate]]

# ------------------------------------------------------------------------- "params<5M,latency<20ms"

COUNT = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}
BYTES = {"KB": 1e-3, "MB": 1, "GB": 1e3}
SHARE = {"%": 0.01, "": 0.01}

# A word, the field that it reads, and what each unit multiplies by.
QUANTITIES: dict[str, tuple[str, dict[str, float]]] = {
    "params": ("params", COUNT),
    "macs": ("macs", COUNT),
    "size": ("size_mb", BYTES),
    "latency": ("latency_ms", {"us": 1e-3, "ms": 1, "s": 1e3}),
    "throughput": ("images_per_second", {"/s": 1, "": 1}),
    "memory": ("memory_mb", BYTES),
    "top1": ("top1", SHARE),
    "top5": ("top5", SHARE),
    "px": ("input_px", {"": 1, "px": 1}),
    "year": ("year", {"": 1}),
}
COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Constraint:
    """One condition, such as latency<20ms."""

    field: str
    compare: Callable[[float, float], bool]
    limit: float  # in the unit of the field
    text: str

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
    for part in map(str.strip, text.rstrip().removesuffix(",").split(",")):
        match = re.fullmatch(
            r"(\w+)\s*([<>]=?)\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(\S*)", part
        )
        if not match:
            raise UserError(
                f"--choose: {part!r} is no constraint; write a word, <, <=, > or >=, a "
                "number and its unit, such as params<5M, and a comma between two"
            )
        word, sign, number, unit = match.groups()
        word = word.lower()
        if word not in QUANTITIES:
            raise unknown("word in --choose", word, QUANTITIES)
        name, units = QUANTITIES[word]
        unit = {u.lower(): u for u in units}.get(unit.lower(), unit)
        if unit not in units:
            said = f"unknown unit {unit!r} of {word}" if unit else f"{word} needs a unit"
            known = ", ".join(u or "none" for u in units)
            raise UserError(f"--choose: {part}: {said}; units of {word}: {known}")
        limit = float(number) * units[unit]
        if units is SHARE and not unit and float(number) <= 1:
            limit = float(number)  # top1>0.75 is 75%
        if units is SHARE and limit > 1:
            raise UserError(f"--choose: {part}: no accuracy is above 100%")
        constraints.append(Constraint(name, COMPARISONS[sign], limit, part))
    return constraints


@dataclass(frozen=True)
class Cost:
    """What one constraint takes away: the best model with all, and with all but this one."""

    constraint: str  # "": all of them together
    points: float | None  # of top-1, a fraction; None where nothing fits
    without: Candidate | None  # the best model if this constraint were dropped
    tied: bool = False  # the seeds can't tell the two apart


@dataclass(frozen=True)
class Choice:
    """What fits, best first, and what each constraint costs."""

    ranked: list[Candidate]
    costs: list[Cost]
    together: Cost  # of all constraints
    tied: list[str]  # models that the seeds can't tell from the first of `ranked`, and itself
    unmeasured: list[str]  # models left out because a figure that is asked for was not measured
    unscored: list[str]  # and because no accuracy is known


def choose(candidates: Sequence[Candidate], constraints: Sequence[Constraint]) -> Choice:
    """Rank what meets every constraint by top-1; of two equals the cheaper first. A tie in the
    verdict (`judge_pairs`) is a tie here.
    """
    verdicts = judge_pairs(candidates)
    by_top1 = sorted((c for c in candidates if c.top1 is not None), key=lambda c: (-c.top1, c.macs))

    def ranked(under: Sequence[Constraint]) -> list[Candidate]:
        return [c for c in by_top1 if all(k.met_by(c) for k in under)]

    chosen = ranked(constraints)

    def cost(text: str, under: Sequence[Constraint]) -> Cost:
        relaxed = ranked(under)
        if not chosen:
            return Cost(text, None, relaxed[0] if relaxed else None)
        best, mine = relaxed[0], chosen[0]
        tied = mine in tied_with_best([best, mine], verdicts)[1:]
        return Cost(text, best.top1 - mine.top1, best, tied)

    return Choice(
        chosen,
        [cost(k.text, [other for other in constraints if other is not k]) for k in constraints],
        cost("", []),
        [c.model for c in tied_with_best(chosen, verdicts)],
        [c.model for c in candidates if any(getattr(c, k.field) is None for k in constraints)],
        [c.model for c in candidates if c.top1 is None],
    )


def describe_choice(choice: Choice) -> str:
    """The ranking and the price of each constraint, as lines to print."""
    lines = []
    for c in choice.ranked[:10]:
        better = sum(other.top1 > c.top1 for other in choice.ranked)
        rank = 1 if c.model in choice.tied else 1 + better
        latency = "" if c.latency_ms is None else f"{c.latency_ms:9.1f} ms"
        lines.append(
            f"{rank:3}. {c.model:<22}{percent(c.top1):>8}{si(c.params):>9} params"
            f"{si(c.macs):>9} MACs{latency}"
        )
    if len(choice.ranked) > 10:
        lines.append(f"     and {len(choice.ranked) - 10} more")
    if not choice.ranked:
        lines.append("Nothing fits.")
    if len(choice.tied) > 1:
        first = [c for c in choice.ranked if c.model in choice.tied]
        cheapest = min(first, key=lambda c: c.macs).model
        lines.append(
            f"{len(first)} share the first place: the seeds can't tell them apart; the cheapest of "
            f"them is {cheapest}"
        )

    def price(cost: Cost) -> str:
        return "nothing that the seeds can tell" if cost.tied else f"{100 * cost.points:.2f} points"

    for cost in choice.costs:
        best = cost.without
        if best is None:
            told = "nothing would fit without it either"
        elif cost.points is None:
            told = f"without it {best.model} would fit ({percent(best.top1)})"
        elif best == choice.ranked[0]:
            told = "costs nothing: the same model wins without it"
        else:
            told = f"costs {price(cost)}: without it {best.model} ({percent(best.top1)})"
        lines.append(f"{cost.constraint}: {told}")
    if choice.ranked:
        best, lost = choice.together.without, price(choice.together)
        told = f"All together cost {lost} against {best.model} ({percent(best.top1)})"
        lines.append(f"{told}, the best of all.")
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


def percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f} %"


def decimal(value: float) -> str:
    """As many decimals as the size deserves.

    >>> [decimal(v) for v in (0.1234, 12.34, 1234.5)]
    ['0.123', '12.3', '1234']
    """
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


class Column(NamedTuple):
    """One column of the table: its head, the field that it shows and sorts by, and how."""

    head: str
    field: str
    show: Callable[[Any], str] = str

    def cell(self, candidate: Candidate) -> str:
        value = getattr(candidate, self.field)
        text = "" if value is None else self.show(value)
        if self.field == "top1" and candidate.top1_std is not None:
            text += f" ± {100 * candidate.top1_std:.2f}"
        return text


COLUMNS = [
    Column("model", "model"),
    Column("lesson", "lesson"),
    Column("year", "year"),
    Column("px", "input_px"),
    Column("top-1", "top1", percent),
    Column("top-5", "top5", percent),
    Column("params", "params", si),
    Column("MACs", "macs", si),
    Column("MACs by thop", "thop_macs", si),
    Column("file MB", "size_mb", decimal),
    Column("latency ms", "latency_ms", decimal),
    Column("IQR ms", "latency_iqr_ms", decimal),
    Column("images/s", "images_per_second", decimal),
    Column("at batch", "batch_size"),
    Column("format", "dtype"),
    Column("peak MB", "memory_mb", decimal),
    Column("epochs", "epochs"),
    Column("rate", "lr", "{:.3g}".format),
    Column("training s", "train_seconds", decimal),
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
    heads = [column.head for column in columns]
    rows = [[column.cell(c) for column in columns] for c in candidates]
    first, *others = [max(map(len, cells)) for cells in zip(heads, *rows)]
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(first), *map(str.rjust, cells[1:], others)]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, [heads, rule, *rows]))


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
    kept = {"title": title, "tables": [asdict(table) for table in tables]}
    write_json(folder / "comparison.json", kept)


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
    pairs = list(combinations(sorted(trained, key=lambda c: -c.top1), 2))
    evidence = []
    for a, b in pairs:
        differences = [x - y for x, y in zip(a.top1_by_seed, b.top1_by_seed, strict=True)]
        evidence.append(OverSeeds(differences, resolution=1 / a.test_images))
    verdicts = judge(evidence, [MARGIN] * len(pairs))
    return {(a.model, b.model): verdict for (a, b), verdict in zip(pairs, verdicts)}


def tied_with_best(
    ranked: Sequence[Candidate], verdicts: dict[tuple[str, str], Verdict]
) -> list[Candidate]:
    """The first of `ranked`, by falling accuracy, and those that by `judge_pairs` it isn't shown to
    be better than. A published accuracy has no seeds and stands for itself.
    """
    pairs = [verdicts.get((ranked[0].model, c.model)) for c in ranked[1:]]
    level = [c for c, pair in zip(ranked[1:], pairs) if pair and pair.outcome != "holds"]
    return [*ranked[:1], *level]


class Budget(NamedTuple):
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
    number, unit = (float(match[1]), match[2]) if match else (0.0, "")
    seconds = number * {"s": 1, "m": 60, "min": 60, "h": 3600}.get(unit, 0)
    if 0 < seconds <= 3.6e6:
        return Budget(seconds=seconds)
    if not seconds and number.is_integer() and 0 < number <= 10_000:
        return Budget(epochs=int(number))
    raise UserError(
        f"--budget {text}: epochs (10) or time per training (90s, 2m, 1h), more than none; 10,000 "
        "epochs or 1,000 hours at most"
    )


def parse_size(text: str, flag: str) -> float:
    """Read "0.3M".

    >>> parse_size("0.3M", "--match-to")
    300000.0
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMG]?)\s*", text)
    if not match:
        raise UserError(f"{flag} {text}: a number with K, M or G, such as 0.3M")
    size = float(match[1]) * COUNT[match[2]]
    if not 1e4 <= size <= 1e11:
        raise UserError(f"{flag} {text}: no net of the course is made that size; 10K to 100G are")
    return size
