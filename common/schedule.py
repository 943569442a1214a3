"""The learning rate at each step, and what it follows from."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from common.config import TrainConfig
from common.data import Loader


class Schedule:
    """The learning rate at each optimizer step: a linear warm-up to the peak, then the shape that
    `kind` names.

    - cosine: half a cosine down to zero.  Loshchilov and Hutter 2017
    - onecycle: up for 30% of the run, from a 25th of the peak, then a cosine down.  Smith and Topin
      2018
    - step: a tenth after half and after three quarters of the run.  He et al. 2015, sec. 4.2
    - plateau: a tenth whenever the validation loss has not fallen for more than 3 epochs
    - linear: straight down to zero
    - constant: the peak

    Every parameter group keeps its own peak, so that groups may learn at different rates.

    Attributes:
        taken: optimizer steps so far.
        last_lr: the rate of the first group in the last step taken.
    """

    FACTOR, PATIENCE = 0.1, 3

    def __init__(self, optimizer: Optimizer, kind: str, steps: int, warmup_steps: int = 0) -> None:
        self.optimizer, self.kind, self.steps = optimizer, kind, steps
        self.warmup_steps = warmup_steps
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.taken, self.plateaus, self.best, self.waited, self.last_lr = 0, 0, math.inf, 0, 0.0
        self._apply()

    def factor(self, step: int) -> float:
        """Share of the peak at optimizer step `step`, counted from 0."""
        if step < self.warmup_steps and self.kind != "onecycle":
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.kind == "linear":
            return 1 - done
        if self.kind == "onecycle":
            rise, start, done = 0.3, 1 / 25, step / max(1, self.steps)
            if done < rise:
                return start + (1 - start) * 0.5 * (1 - math.cos(math.pi * done / rise))
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - rise) / (1 - rise))))
        if self.kind == "step":
            return self.FACTOR ** ((done >= 0.5) + (done >= 0.75))
        if self.kind == "plateau":
            return self.FACTOR**self.plateaus
        return 1.0

    def step(self) -> None:
        """After each optimizer step."""
        self.last_lr = self.optimizer.param_groups[0]["lr"]
        self.taken += 1
        self._apply()

    def epoch_end(self, val_loss: float) -> None:
        """After each epoch; only `plateau` listens."""
        if val_loss < self.best:
            self.best, self.waited = val_loss, 0
            return
        self.waited += 1
        if self.waited > self.PATIENCE:
            self.plateaus, self.waited = self.plateaus + 1, 0
            self._apply()

    def _apply(self) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * self.factor(self.taken)

    def state_dict(self) -> dict[str, Any]:
        kept = ("peaks", "taken", "plateaus", "best", "waited", "steps", "last_lr")
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._apply()


def make_schedule(optimizer: Optimizer, config: TrainConfig, loader: Loader) -> Schedule:
    """The schedule of a resolved config for as many steps as `loader` gives in all epochs."""
    steps_per_epoch = len(loader) // loader.accumulate
    return Schedule(
        optimizer,
        config.schedule,
        steps=config.epochs * steps_per_epoch,
        warmup_steps=round(config.warmup * steps_per_epoch),
    )
