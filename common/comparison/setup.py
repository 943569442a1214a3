"""A comparison before it starts: its flags, its folder, and how it says goodbye."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from common.comparison.entries import chosen_names
from common.comparison.results import parse_budget, parse_constraints, parse_size
from common.engine import processes
from common.engine.errors import Interrupted, UserError
from common.runs import Run, prepare


def settled(config: Any) -> tuple[Any, torch.device]:
    """The config with everything filled in, and the device.

    Raises:
        UserError: flags that can't be read or don't go together, before anything is measured.
    """
    parse_constraints(config.choose)
    chosen_names(config.model, [])
    if config.match_to:
        parse_size(config.match_to, "--match-to")
    if config.budget and parse_budget(config.budget).epochs:
        config = replace(config, epochs=parse_budget(config.budget).epochs)
    if config.pretrained != bool(config.eval_imagenet):
        raise UserError(
            "--eval-imagenet DIR and --pretrained go together: random weights are right once in "
            "1000, and without the real images there is nothing to show official weights"
        )
    if config.eval_imagenet:
        size = {"image_size": 224, "batch_size": config.batch_size or 32}
        config = replace(config, dataset="imagenet", **size)
    elif config.choose and not config.resume and not config.experiment:
        config = replace(config, profile_only=True)  # the published accuracies answer at once
    config, device = prepare(config)
    if processes.world_size() > 1:
        raise UserError("the comparison runs in one process: start it with python, not torchrun")
    return config, device


@contextmanager
def going_on_later(run: Run) -> Iterator[None]:
    """A signal inside ends with the command that goes on: what was finished is kept.

    Raises:
        Interrupted: Ctrl-C or a signal.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(getattr(stop, "signum", signal.SIGINT), run.farewell()) from None
