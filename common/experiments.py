"""An experiment as data: arms that are trained, claims that are judged.

    def skip_connections(config: Config) -> Experiment:
        arms = [Arm("plain", plain_net), Arm("residual", residual_net)]
        claims = [Claim("the shortcut helps", higher="residual", lower="plain", margin=0.01)]
        return Experiment("Skip connections", arms, claims)

    EXPERIMENTS = {"skip-connections": partial(run_experiment, LESSON, skip_connections)}

Every arm is trained with every seed. The same seed means the same split, the same order of images
and the same draw of initial weights, so the differences are paired. A training is kept as soon as
it's done, and what was stopped goes on from there. How claims are judged: common/engine/verdicts.py
"""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from common import plotting
from common.config import TrainConfig
from common.data import Data, make_data, read_once
from common.engine import processes, report
from common.engine.device import describe, memory_format, pick_device, set_up_torch
from common.engine.errors import Diverged, UserError
from common.engine.files import Store, lock, write_json
from common.engine.records import EpochRecord
from common.engine.run_folder import settings_of
from common.engine.signals import stop_says
from common.engine.sources import Source, load_source
from common.engine.surroundings import command, script
from common.engine.verdicts import OverImages, OverSeeds, Verdict, judge, wilson
from common.evaluation import predict
from common.lessons import ROOT
from common.profiling import count_macs, count_parameters
from common.runs import Run, prepare
from common.training import fit, make_optimizer, make_schedule, measure_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]  # one training: the keys that `train_arm` gives, and the extra measures
SEARCH_SEED = 1000  # added to --seed: the search for a rate sees no seed that counts


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
        build: called with `num_classes=...`, as the builders in MODELS are.
        changes: fields of the config in which this arm differs, such as {"lr": 0.1}.
        loss: the config to a loss; cross-entropy with the config's label smoothing by default.
        rates: peak learning rates to choose from, by validation accuracy and with a seed of its
            own that isn't counted; one is taken as it is. Arms that are compared get the same ones.
        rate_of: another arm, whose choice is taken.
        times: factor on the rate that was chosen.
        train: takes the place of `train_trial`, for what is no plain training.
    """

    name: str
    build: Callable[..., nn.Module]
    changes: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable[[Any], nn.Module] | None = None
    rates: Sequence[float] = ()
    rate_of: str = ""
    times: float = 1.0
    train: Callable[[Arm, Data, Any, torch.device], Trial] | None = None


@dataclass(frozen=True)
class Claim:
    """A measure of one arm is higher than that of another, by more than a margin.

    Attributes:
        text: the claim as a sentence without a number.
        higher, lower: names of arms. `lower` may be a number instead, such as chance.
        measure: a key of the records: test_top1, train_loss, ... or what an extra measure gives.
        margin: the least difference that matters, stated beforehand, in units of the measure.
            Negative: `higher` is at most so much worse.
        beyond: two more arms, whose difference is subtracted: the first two are farther apart.
        of_nets: with one seed, compare these two nets over the test images (McNemar) instead of
            leaving it open.
    """

    text: str
    higher: str
    lower: str | float
    measure: str = "test_top1"
    margin: float = 0.0
    beyond: tuple[str, str] | None = None
    of_nets: bool = False


@dataclass(frozen=True)
class Experiment:
    """What `run_experiment` needs.

    Attributes:
        before: extra measures of the untrained net, (model, data) to a dict. A float becomes a
            column, lists are kept for the figure.
        after: the same of a finished training, (trial, data) to a dict; `trial.model` is the net.
        figure: drawn from the results; by default each measure that a claim is about.
        notes: sentences that follow from the results and are no claims.
        data: makes a data set of the images that a seed draws, as `make_data` does.
        seeds: trainings of each arm on digits, where `--seeds` doesn't say; 3 on other images. As
            many as three minutes on two cores hold: an interval of three seeds is a wide one.
    """

    heading: str
    arms: Sequence[Arm]
    claims: Sequence[Claim]
    before: Callable[[nn.Module, Data], Mapping[str, Any]] | None = None
    after: Callable[[Trial, Data], Mapping[str, Any]] | None = None
    figure: Callable[[Results], Figure] | None = None
    notes: Callable[[Results], list[str]] | None = None
    data: Callable[[Source, Any, torch.device], Data] = make_data
    seeds: int = 3


@dataclass(frozen=True)
class Results:
    """All trainings of an experiment, arm by arm and seed by seed."""

    experiment: Experiment
    records: Mapping[str, Sequence[Record]]  # by name of the arm; one a seed, in order

    def values(self, arm: str | float, measure: str) -> list[Any]:
        """One value a seed; None where the training didn't get that far."""
        if not isinstance(arm, str):
            return [arm] * len(next(iter(self.records.values())))
        return [record.get(measure) for record in self.records[arm]]

    def mean(self, arm: str, measure: str) -> float:
        known = [value for value in self.values(arm, measure) if value is not None]
        return mean(known) if known else math.nan

    def edges(self) -> list[str]:
        """A sentence on the arms whose rates were too few: at the edge nobody knows the best."""
        edge = []
        for arm in self.experiment.arms:
            chosen, rates = self.records[arm.name][0]["lr"], sorted({*arm.rates})
            ends = {rates[0]: "least", rates[-1]: "largest"} if len(rates) > 1 else {}
            if chosen in ends:
                edge.append(f"{arm.name} ({ends[chosen]}, {chosen:.3g})")
        told = "best at the edge of the rates tried, so a better one may lie beyond"
        return [f"{told}: {', '.join(edge)}"] if edge else []

    def evidence(self, claim: Claim) -> OverSeeds | OverImages:
        """What the trainings say about a claim."""
        first = self.records[claim.higher]
        if claim.of_nets and len(first) == 1:
            one, two = (_unpack(self.records[arm][0]) for arm in (claim.higher, claim.lower))
            return OverImages(int((one & ~two).sum()), int((two & ~one).sum()), len(one))
        signed = [(claim.higher, 1), (claim.lower, -1)]
        signed += list(zip(claim.beyond, (-1, 1))) if claim.beyond else []
        columns = [self.values(arm, claim.measure) for arm, _ in signed]
        differences = [
            sum(sign * value for value, (_, sign) in zip(values, signed))
            for values in zip(*columns)
            if all(value is not None for value in values)
        ]
        images = {"test_top1": "test_images", "train_top1": "train_images"}.get(claim.measure)
        return OverSeeds(differences, 1 / first[0][images] if images else 0.0)

    def verdicts(self) -> list[Verdict]:
        claims = self.experiment.claims
        return judge([self.evidence(claim) for claim in claims], [c.margin for c in claims])


# ------------------------------------------------------------------------------------- one training


@dataclass(frozen=True)
class Trial:
    """One network trained once. Accuracies are fractions;
    `test_top1` is of the last epoch, so nothing chose it.
    """

    params: int
    macs: int
    test_top1: float
    seconds: float  # of training and validation
    history: list[EpochRecord]
    model: nn.Module | None = None
    right: np.ndarray | None = None  # (test images,) bool


def trained(
    build: Callable[[], nn.Module],
    data: Data,
    config: TrainConfig,
    device: torch.device,
    loss_fn: nn.Module | None = None,
    **options: Any,
) -> tuple[nn.Module, list[EpochRecord]]:
    """What `build` makes, trained by the config's recipe, and its history; options go to `fit`."""
    model = fresh(build, data, config, device)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, data.train)
    loss_fn = loss_fn or nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    return model, fit(model, data, loss_fn, optimizer, schedule, config, **options)


def train_trial(
    name: str,
    build: Callable[[], nn.Module],
    data: Data,
    config: TrainConfig,
    device: torch.device,
    loss_fn: nn.Module | None = None,
) -> Trial:
    """Train what `build` makes by the config's recipe; the same seed for every trial, and no best
    epoch picked.

    Args:
        config: resolved; a trial that differs from the others differs in
            `dataclasses.replace(config, ...)`.
        loss_fn: cross-entropy with the config's label smoothing by default.

    Raises:
        Diverged: the loss is no longer finite.
    """
    began = time.monotonic()
    model, history = trained(build, data, config, device, loss_fn, label=name)
    return tested(name, model, data, history, time.monotonic() - began)


def tested(
    name: str, model: nn.Module, data: Data, history: list[EpochRecord], seconds: float
) -> Trial:
    """A trained network, tested: one line is printed."""
    probabilities, labels = predict(model, data.test)
    right = (probabilities.argmax(1) == labels).numpy()
    last, top1 = history[-1], float(right.mean())
    if processes.is_main():
        scores = f"train {last.train_top1:6.2%}  test {top1:6.2%}  {seconds:.1f} s"
        print(f"{name:<24} train loss {last.train_loss:.4f}  {scores}", flush=True)
    costs = count_parameters(model), count_macs(model, data.input_size)
    return Trial(*costs, top1, seconds, history, model, right)


def fresh(
    build: Callable[[], nn.Module], data: Data, config: TrainConfig, device: torch.device
) -> nn.Module:
    """The untrained net of a seed, the same each time."""
    set_up_torch(device, config.seed, config.deterministic)
    model = build()
    model = model.to(device, memory_format=memory_format(config.image_size, model))
    measure_layers(model, data)
    return model


def train_arm(
    experiment: Experiment, arm: Arm, data: Data, config: TrainConfig, device: torch.device
) -> Record:
    """One arm with one seed, as plain data. A training that diverges counts as a guess: chance in
    accuracy, log(classes) in loss.
    """

    def build() -> nn.Module:
        return arm.build(num_classes=data.num_classes)

    record: Record = {"arm": arm.name, "seed": config.seed, "lr": config.lr, "failure": ""}
    record |= {"test_images": len(data.test.labels), "train_images": len(data.train.labels)}
    if experiment.before:
        record |= experiment.before(fresh(build, data, config, device), data)
    loss_fn = arm.loss(config) if arm.loss else None
    name = f"{arm.name}, seed {config.seed}"
    try:
        if arm.train:
            trial = arm.train(arm, data, config, device)
        else:
            trial = train_trial(name, build, data, config, device, loss_fn)
    except Diverged as error:
        print(f"{name:<24} {error}", flush=True)
        chance, guess = 1 / data.num_classes, math.log(data.num_classes)
        record |= dict.fromkeys(("test_top1", "train_top1", "val_top1"), chance)
        return record | {"train_loss": guess, "failure": str(error)}
    last = trial.history[-1]
    record |= {
        "params": trial.params,
        "macs": trial.macs,
        "train_loss": last.train_loss,
        "train_top1": last.train_top1,
        "val_top1": last.val_top1,
        "test_top1": trial.test_top1,
        "seconds": trial.seconds,
        "losses": [epoch.train_loss for epoch in trial.history],
    }
    if trial.right is not None:
        record["test_images"] = len(trial.right)
        record["right"] = np.packbits(trial.right).tobytes().hex()  # one bit a test image
    return record | dict(experiment.after(trial, data) if experiment.after else {})


def _unpack(record: Record) -> np.ndarray:
    """(test images,) bool: which the net had right."""
    if "right" not in record:  # it diverged
        return np.zeros(record["test_images"], bool)
    bits = np.frombuffer(bytes.fromhex(record["right"]), np.uint8)
    return np.unpackbits(bits, count=record["test_images"]).astype(bool)


# ------------------------------------------------------------------------------- a whole experiment


def run_experiment(
    lesson: str,
    design: Callable[[Any], Experiment],
    config: TrainConfig,
    source: Source | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Train every arm with every seed, judge the claims, and write experiment.json, a figure and
    report.html; returns what experiment.json holds.

    Args:
        source: the images, where they are at hand already.
        run: where it's kept, if it's a part of this run.

    Raises:
        Interrupted: Ctrl-C or a signal; every finished training is kept.
    """
    if config.pretrained and source is None:
        raise UserError(
            f"--experiment {config.experiment} trains every net from random weights: leave out "
            "--pretrained; with torchvision:NAME add --strategy scratch"
        )
    config, device = prepare(config)
    experiment = design(config)
    many = config.dataset == "digits" and not config.smoke
    seeds = config.seeds or (experiment.seeds if many else 3)
    config = replace(config, seeds=seeds)
    sides = [arm.changes.get("image_size", config.image_size) for arm in experiment.arms]
    source = source or read_once(load_source(config), replace(config, image_size=max(sides)))
    if run is None:
        # One process alone looks: it takes the folder's lock.
        left = _left(config, lesson) if processes.is_main() and not config.resume else ""
        config = replace(config, resume=config.resume or processes.from_main(left))
        run = Run.open(config, lesson)
    store = open_store(run, lesson, source.fingerprint, device, design)

    def kept() -> str:
        kept = f"{len(store.results)} finished trainings are kept"
        return f"stopped; {kept}. Go on with: {run.go_on()}"

    with stop_says(kept):
        return _outcome(run, train_arms(experiment, config, device, source, store), seeds)


def train_arms(
    experiment: Experiment, config: TrainConfig, device: torch.device, source: Source, store: Store
) -> Results:
    """Each arm's rate, then every arm with every seed, from the store where it is there.

    Seed by seed: an experiment that's stopped early has compared like with like.
    """
    arms = {arm.name: arm for arm in experiment.arms}
    memo: list[tuple[TrainConfig, Data]] = []  # the last data, for arms that share their settings

    def one(arm: Arm, seed: int, **more: Any) -> Record:
        """From the store, or trained now and stored."""
        changes = {**arm.changes, **more}
        key = ", ".join([arm.name, f"seed {seed}", *(f"{k} {v}" for k, v in changes.items())])
        if processes.from_main(store.get(key)) is None:
            sized = replace(config, seed=seed, **changes)
            plain = replace(sized, lr=config.lr, base_lr=config.base_lr)
            if not memo or memo[0][0] != plain:
                memo[:] = [(plain, experiment.data(source.redrawn(seed), plain, device))]
            data = memo[0][1]
            batching = data.train.batch_size, data.train.accumulate
            record = train_arm(experiment, arm, data, sized, device)
            data.train.rebatch(*batching)  # halved, if memory ran out: that was this arm's affair
            if processes.is_main():
                store.put(key, record)
        return processes.from_main(store.get(key))

    def rate(arm: Arm) -> dict[str, float]:
        """The rate that does best on validation images, if the arm is to choose."""
        chooser = arms[arm.rate_of] if arm.rate_of else arm
        if not chooser.rates:
            return {}
        if len(chooser.rates) == 1:
            return {"lr": chooser.rates[0] * arm.times}
        tried = {lr: one(chooser, config.seed + SEARCH_SEED, lr=lr) for lr in chooser.rates}
        best = max(tried, key=lambda lr: (tried[lr]["val_top1"], -tried[lr]["train_loss"]))
        return {"lr": best * arm.times}

    rates = {name: rate(arm) for name, arm in arms.items()}
    records: dict[str, list[Record]] = {name: [] for name in arms}
    began, known = time.monotonic(), len(store.results)
    for seed in range(config.seed, config.seed + config.seeds):
        for name, arm in arms.items():
            records[name].append(one(arm, seed, **rates[name]))
        more, made = config.seeds - 1, len(store.results) - known  # what was kept took no time
        if seed == config.seed and more and made and processes.is_main():
            seconds = more * len(arms) * (time.monotonic() - began) / made
            print(f"expected   about {seconds:.0f} s more, for seeds: {more}", flush=True)
    return Results(experiment, records)


def _outcome(run: Run, results: Results, seeds: int) -> dict[str, Any]:
    """Draw, judge, conclude."""
    experiment = results.experiment
    if processes.is_main():
        name = (run.config.experiment or "comparison").replace("-", "_")
        run.figure(name, (experiment.figure or draw)(results))
    verdicts = results.verdicts()
    sentences = [tell(c, v, seeds) for c, v in zip(experiment.claims, verdicts)]
    sentences += results.edges() + (experiment.notes(results) if experiment.notes else [])
    if wanted := [v.seeds_to_decide for v in verdicts if v.seeds_to_decide]:
        flags = "--resume", str(run.folder), "--seeds", str(min(max(wanted), 100))
        sentences.append(f"more seeds: {command(*flags)}")
    judged = [
        {"text": c.text, **{k: _finite(v) for k, v in asdict(v).items()}}
        for c, v in zip(experiment.claims, verdicts)
    ]
    return conclude(
        run,
        rows(results),
        sentences,
        heading=experiment.heading,
        seeds=seeds,
        claims=judged,
        trainings=[record for records in results.records.values() for record in records],
    )


def open_store(
    run: Run,
    lesson: str,
    fingerprint: str,
    device: torch.device,
    design: Callable[[Any], Experiment] | None = None,
) -> Store:
    """Trainings of the same settings, images, machine and text of lesson and design."""
    config = run.config
    fixed = {k: v for k, v in config.to_dict().items() if k not in config.FREE_ON_RESUME}
    # A student who changes a block and runs again doesn't get the numbers of before. A copy of the
    # lesson may lie anywhere; of a notebook's cells there is no file.
    typed = Path(script())
    text = typed if typed.stem == lesson and typed.is_file() else ROOT / f"{lesson}.py"
    code = hashlib.sha256(text.read_bytes())
    if design and design.__module__.startswith("common."):  # then its nets are there too
        code.update(Path(inspect.getfile(design)).read_bytes())
    here = {"device": describe(device), "torch": torch.__version__}
    settings = {**fixed, **here, "data": fingerprint, "lesson": code.hexdigest()[:16]}
    return Store(run.folder / "trainings.json", settings, run.resumed and processes.is_main())


def _left(config: TrainConfig, lesson: str) -> str:
    """The newest run of the same settings that was stopped, or killed, on its way; "" if none."""
    wanted = {"lesson": lesson, **config.to_dict()}
    for path in sorted(Path(config.run_dir, lesson).glob("*/trainings.json"), reverse=True):
        if (path.parent / "experiment.json").exists():
            continue
        if settings_of(path.parent) == wanted and lock(path.parent / ".lock"):  # nobody is at it
            return str(path.parent)
    return ""


def _finite(value: Any) -> Any:
    """JSON knows no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------------- what it comes to


def tell(claim: Claim, verdict: Verdict, seeds: int) -> str:
    """A claim and its outcome as a sentence, with the interval that decided it."""
    share = "top1" in claim.measure

    def said(number: float) -> str:
        return f"{100 * number:+.2f}" if share else f"{number:+.3g}"

    unit = " points" if share else f" {claim.measure.replace('_', ' ')}"
    line = f"{verdict.outcome:<10} {claim.text}: {said(verdict.difference)}{unit}"
    if math.isfinite(verdict.low):
        line += (
            f" ({100 * verdict.confidence:.3g}% interval {said(verdict.low)} to "
            f"{said(verdict.high)}, {seeds} seed{'s' * (seeds > 1)}; claimed: more than "
            f"{said(claim.margin)})"
        )
    elif seeds == 1:
        line += " with one seed, which decides nothing"
    else:
        line += ", the same in all seeds or known of too few: the chance stays unknown"
    if verdict.seeds_to_decide:
        line += f"; about {verdict.seeds_to_decide} seeds would decide"
    return line


def rows(results: Results) -> list[dict[str, Any]]:
    """One line an arm: means over seeds, with the standard deviation where there are several."""
    every = [record for records in results.records.values() for record in records]
    hidden = ("lr", "val_top1", "seconds")
    numbers = [k for r in every for k, v in r.items() if isinstance(v, float) and k not in hidden]
    numbers = list(dict.fromkeys(numbers))
    table = []
    for name, records in results.records.items():
        row: dict[str, Any] = {"name": name, "parameters": records[0].get("params")}
        row["M MACs"] = round(records[0].get("macs", 0) / 1e6, 2)
        if any(r["lr"] != every[0]["lr"] for r in every):
            row["rate"] = f"{records[0]['lr']:.3g}"
        for key in numbers:
            values = [v for r in records if (v := r.get(key)) is not None]
            row[_column(key)] = _spread(values, percent="top1" in key) if values else None
        if len(records) == 1 and not records[0]["failure"]:
            low, high = wilson(int(_unpack(records[0]).sum()), records[0]["test_images"])
            row["95% interval"] = f"{low:.1%} to {high:.1%}"
        row["seconds"] = round(mean(r.get("seconds", 0.0) for r in records), 1)
        if failed := sum(bool(r["failure"]) for r in records):
            row["diverged"] = failed
        table.append(row)
    return table


def _column(key: str) -> str:
    return key.replace("_top1", " top-1").replace("_", " ")


def _spread(values: Sequence[float], percent: bool) -> str:
    scale, digits = (100, ".2f") if percent else (1, ".4g")
    text = f"{scale * mean(values):{digits}}" + "%" * percent
    return text + (f" ± {scale * stdev(values):{digits}}" if len(values) > 1 else "")


def draw(results: Results) -> Figure:
    """What the records hold as lists, such as the loss by epoch, as curves; each measure that a
    claim is about with every seed as a point, mean and interval.

    The key of a list names its axes: "gradient by layer, at the start".
    """
    firsts = [records[0] for records in results.records.values()]
    record = max(firsts, key=len)
    lists = [k for k, v in record.items() if isinstance(v, list)]
    lists.sort(key=lambda k: k != "losses")
    if len(firsts) > 1:  # arms that share one training have one curve, which compares nothing
        lists = [k for k in lists if any(r.get(k) != record[k] for r in firsts)]
    measures = list(dict.fromkeys(c.measure for c in results.experiment.claims)) or ["test_top1"]
    figure, axes = plotting.panels(len(lists) + len(measures), results.experiment.heading)
    for key, ax in zip(lists, axes):
        series = {name: [v for v in results.values(name, key) if v] for name in results.records}
        every = [number for runs in series.values() for values in runs for number in values]
        steep = min(every) > 0 and max(every) > 50 * min(every)
        title = "training loss by epoch" if key == "losses" else key
        ylabel, _, x = title.partition(",")[0].partition(" by ")
        plotting.curves(series, x, ylabel, title.capitalize(), log_y=steep, ax=ax)
    for measure, ax in zip(measures, axes[len(lists) :]):
        values = {name: results.values(name, measure) for name in results.records}
        title = _column(measure).capitalize()
        xlabel = "each seed, mean and 95% interval"
        plotting.seeds(values, xlabel, title, percent="top1" in measure, ax=ax)
    return figure


def conclude(
    run: Run, rows: list[dict[str, Any]], verdict: list[str], **more: Any
) -> dict[str, Any]:
    """An experiment's outcome: the table and the verdict printed, experiment.json and report.html
    written.

    Args:
        rows: one dict a line; the keys of the first are the columns.
        verdict: sentences that follow from the numbers.
        **more: further numbers for experiment.json.
    """
    outcome = {
        "lesson": run.lesson,
        "experiment": run.config.experiment,
        "dataset": run.config.dataset,
        "seed": run.config.seed,
        "epochs": run.config.epochs,
        "device": describe(pick_device(run.config.device)),
        "torch_version": torch.__version__,
        "rows": rows,
        "verdict": verdict,
        **more,
    }
    if not processes.is_main():
        return outcome
    write_json(run.folder / "experiment.json", outcome)
    shown = ("lesson", "seed", "seeds", "epochs", "device", "torch_version")
    facts = {k: outcome[k] for k in shown if k in outcome}
    facts["command"] = command()
    title = f"{run.config.experiment} on {run.config.dataset}"
    page = report.write_report(
        run.folder, title, facts, {"Measured": rows}, run.figures, notes=verdict
    )
    print(format_table(rows))
    for sentence in verdict:
        print(f"verdict    {sentence}")
    for path in run.figures:
        print(f"figure     {path}")
    print(f"report     {page}{run.where()}", flush=True)
    return outcome


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows of one kind as aligned text, numbers to the right."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    right = [
        all(not isinstance(row.get(c), str) or row[c][:1].isdigit() for row in rows)
        for c in columns
    ]

    def line(values: list[str]) -> str:
        parts = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right))
        return "  ".join(parts).rstrip()

    return "\n".join(["", line(columns), *(line(c) for c in cells), ""])


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)
