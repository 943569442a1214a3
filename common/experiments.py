"""What the lessons' experiments share: a trial trained
under the common recipe, and an outcome that is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from common.config import TrainConfig
from common.data import Data
from common.engine.device import memory_format, set_up_torch
from common.engine.errors import Diverged
from common.engine.records import EpochRecord
from common.evaluation import score
from common.profiling import count_macs, count_parameters
from common.training import fit, make_optimizer, make_schedule


@dataclass(frozen=True)
class Trial:
    """One network trained once. Accuracies are fractions;
    `test_top1` is of the last epoch, so nothing chose it.
    """

    name: str
    params: int
    macs: int
    test_top1: float
    seconds: float  # of training and validation
    history: list[EpochRecord]
    loss: list[float] = field(default_factory=list)  # at every optimizer step
    first_layer_gradient: list[float] = field(
        default_factory=list
    )  # its norm, at every optimizer step
    model: nn.Module | None = None

    def row(self) -> dict[str, object]:
        """The line of the table that an experiment prints."""
        last = self.history[-1]
        return {
            "name": self.name,
            "parameters": self.params,
            "M MACs": round(self.macs / 1e6, 2),
            "train loss": round(last.train_loss, 4),
            "train top-1": f"{last.train_top1:.2%}",
            "test top-1": f"{self.test_top1:.2%}",
            "seconds": round(self.seconds, 1),
        }


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
        Diverged: the loss is no longer finite; with the losses of the steps that were.
    """
    set_up_torch(device, config.seed, config.deterministic)
    model = build()
    model = model.to(device, memory_format=memory_format(config.image_size, model))
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, data.train)
    loss_fn = loss_fn or nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    losses: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    first = next(model.parameters())

    def note(loss: torch.Tensor) -> None:
        losses.append(loss)
        gradients.append(first.grad.norm())

    began = time.monotonic()
    try:
        history = fit(model, data, loss_fn, optimizer, schedule, config, label=name, on_step=note)
    except Diverged as error:
        error.losses = [float(loss) for loss in losses]
        raise
    seconds = time.monotonic() - began
    _, top1 = score(model, data.test)
    last = history[-1]
    print(
        f"{name:<24} train loss {last.train_loss:.4f}  train {last.train_top1:6.2%}  test "
        f"{top1:6.2%}  "
        f"{seconds:.1f} s",
        flush=True,
    )
    return Trial(
        name,
        count_parameters(model),
        count_macs(model, data.input_size),
        top1,
        seconds,
        history,
        torch.stack(losses).tolist(),
        torch.stack(gradients).tolist(),
        model=model,
    )


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; the deviation of one value is 0."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
