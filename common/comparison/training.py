"""Many models trained with many seeds, and the files where each result is kept as it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from common.comparison.results import Budget, Training, parse_budget
from common.comparison.sweeps import Entry
from common.config import TrainConfig, numbers_of
from common.data import Data, load_data
from common.engine.device import describe
from common.engine.errors import UserError
from common.engine.progress import Bar
from common.engine.store import Store
from common.evaluation import evaluate
from common.experiments import SEARCH_SEED, trained

if TYPE_CHECKING:
    from common.runs import Run

TRAINING = 8  # units of the progress bar; a measurement is 1

OwnRecipe = Callable[[str, Any], Any]  # a model's name and the common config to its own


def open_stores(
    config: TrainConfig, run: Run, device: torch.device, data: str
) -> tuple[Store, Store]:
    """What was measured and what was trained in the run's folder before, under these settings.

    Args:
        config: `pass_limit` and all that may not change on resume.
        data: the fingerprint of the images.
    """
    machine = describe(device)
    setup = {"device": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
    speed = {"amp": config.amp, "compile": config.compile, "pass_limit": config.pass_limit}
    fixed = {k: v for k, v in config.to_dict().items() if k not in config.FREE_ON_RESUME}
    profiles = Store(run.folder / "profiles.json", {**setup, **speed}, run.resumed)
    trainings = Store(run.folder / "trainings.json", {**setup, **fixed, "data": data}, run.resumed)
    return profiles, trainings


def train_once(entry: Entry, data: Data, config: TrainConfig, device: torch.device) -> Training:
    """One training with `config.seed` and `config.epochs`, tested once at its end."""
    began, history, test, failure = time.monotonic(), [], None, ""
    try:
        model, history = trained(entry.build, data, config, device)
        seconds = time.monotonic() - began
        test = evaluate(model, data.test, data.class_names)
    except UserError as error:  # the loss is no longer finite: that is a result too
        seconds, failure = time.monotonic() - began, str(error)
    return Training(
        model=entry.candidate.model,
        seed=config.seed,
        epochs=config.epochs,
        lr=config.lr,
        params=entry.candidate.params,
        macs=entry.candidate.macs,
        test_top1=test and test.top1,
        test_top5=test and test.top5,
        seconds=seconds,
        train_loss=[record.train_loss for record in history],
        val_top1=[record.val_top1 for record in history],
        failure=failure,
        test_images=sum(c.support for c in test.per_class) if test else 0,
    )


def epochs_within(
    budget: Budget, entry: Entry, data: Data, config: TrainConfig, device: torch.device
) -> int:
    """The whole epochs that fit the budget, from the time of one on a throw-away copy."""
    if budget.epochs:
        return budget.epochs
    trial = train_once(entry, data, replace(config, epochs=1, warmup=0), device)
    return max(1, int(budget.seconds / trial.seconds))


def search_steps(config: Any) -> int:
    """Units of the bar that the search for one model's rate takes."""
    factors = len(numbers_of(config.rates, "--rates"))
    return factors * TRAINING // 2 if factors > 1 else 0


def train_all(
    own: OwnRecipe,
    entries: Sequence[Entry],
    config: Any,
    device: torch.device,
    store: Store,
    bar: Bar,
) -> list[Training]:
    """Every model with every seed, from the store where it is there, each at its own best rate.

    The rate is chosen by the training loss after half the epochs, with a seed that isn't counted:
    so early nothing is over-fitted yet, and validation is noisy, for BatchNorm's running averages
    lag behind the weights. Then seed by seed: a comparison that is stopped early has compared like
    with like.

    Args:
        config: with `rates`, factors on the learning rate; `budget` and `seeds`.
    """
    budget = parse_budget(config.budget) if config.budget else Budget(epochs=config.epochs)
    factors = numbers_of(config.rates, "--rates") or [1.0]
    epochs: dict[str, int] = {}
    last: list[tuple[int, Data]] = []

    def data_of(seed: int) -> Data:
        if not last or last[0][0] != seed:
            last[:] = [(seed, load_data(replace(config, seed=seed), device))]
        return last[0][1]

    def one(e: Entry, seed: int, factor: float, share: float = 1.0) -> Training:
        """From the store, or trained now and stored."""
        name = e.candidate.model
        key = f"{name}, {e.candidate.params} parameters, rate x {factor:g}, seed {seed}"
        if store.get(key) is None:
            data, settings = data_of(seed), own(name, replace(config, seed=seed))
            if name not in epochs:
                epochs[name] = epochs_within(budget, e, data, settings, device)
            some = {"epochs": math.ceil(share * epochs[name]), "lr": factor * settings.lr}
            store.put(key, train_once(e, data, replace(settings, **some), device))
        training = Training(**store.get(key))
        if share == 1:
            epochs[name] = training.epochs  # the same for all seeds, however busy the machine
        bar.advance(math.ceil(share * TRAINING), f"{name}, seed {seed}")
        return training

    def best_of(e: Entry) -> float:
        if len(factors) == 1:
            return factors[0]
        tried = {f: one(e, config.seed + SEARCH_SEED, f, 0.5) for f in factors}
        return min(tried, key=lambda f: math.inf if tried[f].failure else tried[f].train_loss[-1])

    chosen = [best_of(e) for e in entries]
    return [
        one(e, seed, factor)
        for seed in range(config.seed, config.seed + config.seeds)
        for e, factor in zip(entries, chosen)
    ]
