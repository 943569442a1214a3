"""The flags of a comparison, before it starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from common.comparison.entries import chosen_names
from common.comparison.results import parse_budget, parse_constraints, parse_size
from common.engine import processes
from common.engine.errors import UserError
from common.runs import prepare


def settled(config: Any) -> tuple[Any, torch.device]:
    """The config with everything filled in, and the device.

    Raises:
        UserError: flags that can't be read or don't go together, before anything is measured.
    """
    parse_constraints(config.choose)
    chosen_names(config.model, [])
    if config.match_to:
        parse_size(config.match_to, "--match-to")
    if (config.match_to or config.match != "params") and config.experiment != "matched-size":
        raise UserError("--match and --match-to are for --experiment matched-size")
    if config.budget and (epochs := parse_budget(config.budget).epochs):
        config = replace(config, epochs=epochs)
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
