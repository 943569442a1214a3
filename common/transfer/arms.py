"""Trainings of lesson 8's experiments that are no plain ones, and what is measured of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from common import plotting
from common.data import Data, Loader, make_data, read_once
from common.engine.sources import load_source
from common.experiments import Arm, Results, Trial, fresh, tested
from common.training import fit, make_optimizer, make_schedule
from common.transfer.flags import locate
from common.transfer.images import PairLoader, other_domain, source_of
from common.transfer.parts import TwoDomains

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ------------------------------------------------------------------------------------ rare classes


def recalls(trial: Trial, data: Data) -> dict[str, Any]:
    """Mean recall, recall of the last class, and of each; of classes with test images."""
    labels = data.test.labels.numpy()
    each = [float(trial.right[labels == c].mean()) for c in np.unique(labels)]
    return {"mean_recall": mean(each), "rarest_recall": each[-1], "recalls": each}


def recall_figure(data: Data, results: Results) -> Figure:
    """A row an arm, a column a class with its training images in `data`."""
    shown = data.test.labels.unique().tolist()  # a class of two images has none there
    nothing = [[np.nan] * len(shown)]  # where every training diverged
    table = [
        np.mean([v for v in results.values(name, "recalls") if v] or nothing, axis=0)
        for name in results.records
    ]
    counts = torch.bincount(data.train.labels, minlength=data.num_classes).tolist()
    return plotting.heatmap(
        np.stack(table),
        list(results.records),
        [f"{data.class_names[c]} ({counts[c]})" for c in shown],
        "Recall of each class, mean over seeds",
        xlabel="class (its training images)",
        percent=True,
        limits=(0, 1),
    )


# ----------------------------------------------------------------------------------- other domains


def way_to_the_oracle(results: Results) -> list[str]:
    """How far each method gets from the first arm to the last."""
    top1 = {name: results.mean(name, "test_top1") for name in results.records}
    (first, low), *others, (last, high) = top1.items()
    told = (f"{name} {(value - low) / (high - low):.0%}" for name, value in others)
    return [f"of the way from {first} to {last}: {', '.join(told)}"] if high > low else []


def adaptation(
    config: Any,
    build: Callable[[int], nn.Module],
    methods: Mapping[str, Callable[[int, int], nn.Module]],
    adapt: Callable[[nn.Module, Loader], nn.Module],
) -> Callable[[Arm, Data, Any, torch.device], Trial]:
    """The training of arms named METHOD or METHOD + AdaBN, tested on the target. METHOD is "source
    only", "oracle", or a key of `methods`.

    A net is trained once, and tested with the statistics that its training left and with those of
    the target.

    Args:
        config: with `shift`, or with `target_dir`.
        methods: width of the features and steps of the training to a loss of what `TwoDomains`
            gives.
        adapt: gives a model the BatchNorm statistics of a loader's images.
    """
    folder = None
    if config.target_dir:
        settings = locate(dataclasses.replace(config, dataset=config.target_dir), "--target-dir")
        folder = read_once(load_source(settings), settings)
    nets: dict[tuple[str, int], tuple] = {}  # by method and seed: the net, its history, the seconds

    def train(arm: Arm, here: Data, config: Any, device: torch.device) -> Trial:
        target = other_domain(source_of(here), folder, config.shift)
        there = make_data(target, config, device, (here.mean, here.std))
        method, _, new_statistics = arm.name.partition(" + ")
        key = method, config.seed
        if key not in nets:
            nets[key] = learn(method, here, there, config, device)
        model, history, seconds = nets[key]
        if new_statistics:
            model = adapt(deepcopy(model), there.train)
        return tested(f"{arm.name}, seed {config.seed}", model, there, history, seconds)

    def learn(method: str, here: Data, there: Data, config: Any, device: torch.device) -> tuple:
        model = fresh(partial(build, here.num_classes), here, config, device)
        learner, loss_fn, data = model, nn.CrossEntropyLoss(), here
        if method == "oracle":  # the target's labels, and three times as long: to convergence
            longer = 1 if config.smoke else 3
            data, config = there, dataclasses.replace(config, epochs=longer * config.epochs)
        elif method != "source only":
            data = dataclasses.replace(here, train=PairLoader(here.train, there.train))
            width, steps = model.get_classifier().in_features, config.epochs * len(data.train)
            learner, loss_fn = TwoDomains(model), methods[method](width, steps).to(device)
        optimizer = make_optimizer(nn.ModuleList([learner, loss_fn]), config)  # a critic learns too
        schedule = make_schedule(optimizer, config, data.train)
        began = time.monotonic()
        history = fit(learner, data, loss_fn, optimizer, schedule, config, label=method)
        return model, history, time.monotonic() - began

    return train
