"""The trainings of a comparison: an experiment whose arms are networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from common.comparison.results import parse_budget
from common.data import Data, make_data, read_once
from common.engine.files import Store
from common.engine.sources import Source
from common.evaluation import evaluate
from common.experiments import Arm, Experiment, Results, Trial, train_arms, train_trial


def train_all(
    arms: Sequence[Arm], config: Any, device: torch.device, source: Source, store: Store
) -> Results:
    """Every network with every seed, each at the rate that it chose, from the store where it is
    there.
    """
    source = read_once(source, config)
    if config.budget and parse_budget(config.budget).seconds:
        arms = within_seconds(arms, config, device, source, store)
    return train_arms(Experiment("", arms, [], after=more_of), config, device, source, store)


def more_of(trial: Trial, data: Data) -> Mapping[str, Any]:
    """What a comparison keeps beside what every experiment keeps."""
    top5 = evaluate(trial.model, data.test, data.class_names).top5
    return {"test_top5": top5, "val_by_epoch": [epoch.val_top1 for epoch in trial.history]}


def within_seconds(
    arms: Sequence[Arm], config: Any, device: torch.device, source: Source, store: Store
) -> list[Arm]:
    """The arms with the whole epochs that fit the budget, from the time of one epoch.

    The time is kept: on resume the epochs are the same, however busy the machine.
    """
    data = make_data(source.redrawn(config.seed), config, device)
    timed, seconds = [], parse_budget(config.budget).seconds
    for arm in arms:
        key = f"{arm.name}, one epoch"
        if store.get(key) is None:
            one = replace(config, **{**arm.changes, "lr": 1e-6, "epochs": 1, "warmup": 0})
            build = partial(arm.build, num_classes=data.num_classes)
            store.put(key, {"seconds": train_trial(key, build, data, one, device).seconds})
        fit = int(seconds / store.get(key)["seconds"])
        epochs = min(max(1, fit), 10_000)  # what --epochs may be at most
        warmup = min(config.warmup, epochs / 5)  # a short training must not be all warm-up
        timed.append(replace(arm, changes={**arm.changes, "epochs": epochs, "warmup": warmup}))
    return timed
