"""Many models trained with many seeds, and the files where each result is kept as it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from common.comparison.results import Budget, Training, parse_budget
from common.comparison.sweeps import Entry
from common.config import TrainConfig
from common.data import Data, load_data
from common.engine.device import describe
from common.engine.progress import Bar
from common.engine.store import Store

if TYPE_CHECKING:
    from common.runs import Run

TRAINING = 8  # units of the progress bar; a measurement is 1

TrainOnce = Callable[[Entry, Data, TrainConfig, torch.device], Training]


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


def epochs_within(
    budget: Budget,
    train_once: TrainOnce,
    entry: Entry,
    data: Data,
    config: TrainConfig,
    device: torch.device,
) -> int:
    """The whole epochs that fit the budget, from the time of one on a throw-away copy."""
    if budget.epochs:
        return budget.epochs
    trial = train_once(entry, data, replace(config, epochs=1, warmup=0), device)
    return max(1, int(budget.seconds / trial.seconds))


def train_all(
    train_once: TrainOnce,
    entries: Sequence[Entry],
    config: TrainConfig,
    device: torch.device,
    store: Store,
    bar: Bar,
) -> list[Training]:
    """Every model with every seed, from the store where it is there.

    Seed by seed: a comparison that is stopped early has compared like with like.
    """
    budget = parse_budget(config.budget) if config.budget else Budget(epochs=config.epochs)
    epochs: dict[str, int] = {}
    trainings = []
    for seed in range(config.seed, config.seed + config.seeds):
        seeded, data = replace(config, seed=seed), None
        for e in entries:
            name = e.candidate.model
            key = f"{name}, {e.candidate.params} parameters, seed {seed}"
            if store.get(key) is None:
                data = data or load_data(seeded, device)
                if name not in epochs:
                    epochs[name] = epochs_within(budget, train_once, e, data, seeded, device)
                store.put(key, train_once(e, data, replace(seeded, epochs=epochs[name]), device))
            training = Training(**store.get(key))
            epochs[name] = training.epochs  # the same for all seeds, however busy the machine
            trainings.append(training)
            bar.advance(TRAINING, f"{name}, seed {seed}")
    return trainings
