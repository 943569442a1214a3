"""The training loop. `train_one_epoch` is the whole of it; the rest is what it stands on."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from common.config import TrainConfig
from common.data import Data, Loader
from common.engine import checkpoint, processes
from common.engine.device import amp_dtype, autocast, restore_rng_state, rng_state
from common.engine.guard import Guard, with_less_memory
from common.engine.keeper import Keeper
from common.engine.meter import Meter
from common.engine.records import EpochRecord
from common.evaluation import score
from common.optimizers import Muon, kernels_apart
from common.schedule import Schedule, make_schedule

if TYPE_CHECKING:
    from common.runs import Run

OnStep = Callable[[Tensor], None]

__all__ = ["Aids", "fit", "make_optimizer", "make_schedule", "measure_layers", "train_one_epoch"]


def train_one_epoch(
    model: nn.Module,
    loader: Loader,
    loss_fn: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
    aids: Aids,
) -> None:
    """One pass over the training images, from the batch at which the last run stopped.

    An optimizer step takes `loader.accumulate` batches, whose gradients add up. What `aids` brings
    is explained there, a line each.
    """
    model.train()
    for x, y in loader.batches(aids.meter.epoch, start=aids.meter.batch):
        step_now = (aids.meter.batch + 1) % loader.accumulate == 0
        with processes.gradient_sync(model, last=step_now):  # several GPUs: only before a step
            with autocast(x.device, aids.amp):
                output = model(x)  # (N, num_classes), or a tuple that begins with it
                loss = loss_fn(output, y)
            aids.scaler.scale(loss / loader.accumulate).backward()
        aids.meter.count(loss, output, y)
        if step_now:
            aids.scaler.unscale_(optimizer)
            if aids.on_step is not None:
                aids.on_step(loss.detach())
            aids.guard.check(loss, optimizer, aids.meter.epoch + 1, schedule.taken + 1)
            aids.scaler.step(optimizer)  # calls optimizer.step()
            aids.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if aids.average is not None:
                aids.average.update(model, schedule.taken)
            aids.meter.step_taken(len(loader))
            aids.keeper.after_step(schedule.taken)


@dataclass
class Aids:
    """What the loop needs beside model, images and optimizer."""

    amp: torch.dtype | None  # of the forward pass in mixed precision; None: float32 throughout
    scaler: torch.amp.GradScaler  # enlarges the loss lest float16's gradients vanish; else idle
    average: Average | None  # the running average of the weights, which is what gets tested
    meter: Meter  # where the run stands: epochs, batches, loss, hits, seconds, the bar
    guard: Guard  # clips the gradient, and stops before a step that is not finite
    keeper: Keeper  # saves now and then, and leaves after this step if a signal came
    on_step: OnStep | None = None  # an experiment's own look at loss and gradients


class Average:
    """A running average of the weights and of BatchNorm's statistics, in `module`.

    average = d * average + (1 - d) * weights, with d = min(decay, (1 + step) / (10 + step)): after
    few steps a large decay would keep the random weights of the start.  Szegedy et al. 2016, sec.
    8; the warm-up is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module, self.decay = deepcopy(model), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After optimizer step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = zip(*(chain(m.parameters(), m.buffers()) for m in (self.module, model)))
        averages, weights = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
        torch._foreach_lerp_(averages, weights, 1 - decay)  # one kernel for all tensors


def measure_layers(model: nn.Module, data: Data, images: int = 2000) -> None:
    """Let each layer that follows from the images, and is not trained, look at some of them."""
    for layer in model.modules():
        if hasattr(layer, "measure"):
            layer.measure(data.train.take(np.arange(min(images, len(data.train.labels)))))


# ------------------------------------------------------------------------------------ the optimizer


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """SGD with Nesterov momentum, AdamW or Muon; one fused kernel for all where it exists."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "muon":
        return Muon(kernels_apart(groups, config.lr), config.lr, config.momentum)
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.lr, fused=fused)
    return SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels, none for biases and norms.  He et al. 2019, "Bag of
    tricks", sec. 3.1.

    A norm's scale and a bias are vectors: pulling them to zero switches channels off instead of
    smoothing. A parameter with an attribute `no_decay` that is true has none either.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1 and not getattr(p, "no_decay", False)]
    chosen = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in chosen], "weight_decay": 0.0},
    ]


# --------------------------------------------------------------------------------------- whole runs


def fit(
    model: nn.Module,
    data: Data,
    loss_fn: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
    config: TrainConfig,
    run: Run | None = None,
    label: str = "",
    on_step: OnStep | None = None,
) -> list[EpochRecord]:
    """Train for `config.epochs`, validating after each; `model` ends with the weights of the best
    epoch.

    The best epoch is the one of the highest validation accuracy, the lower loss where two are
    equal. With a `run` everything is saved there and a run that was stopped goes on where it was,
    to the same weights. Without one nothing is written, and the weights are those of the last
    epoch, or their average.

    Args:
        label: shown before the epoch's number; without it and without a `run` nothing is shown.
        on_step: called before each optimizer step with the loss, 0-d, on the device; every
            parameter's `grad` is there.

    Raises:
        Interrupted: a signal came; raised after the step in hand is finished and saved.
        Diverged: the loss is no longer finite.
        UserError: the disk is full, memory is out.
    """
    device = next(model.parameters()).device
    amp = amp_dtype(device, config.amp, config.image_size)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    average = Average(model, config.ema) if config.ema else None
    evaluated = average.module if average else model
    # Compiled inside, so that the processes' wrapper outside still sees which step exchanges.
    trained = torch.compile(model) if config.compile else model
    trained = processes.parallel(trained, device, config.sync_bn)
    show = bool(label or run) and processes.is_main()
    meter = Meter(device, config.epochs, show)
    meter.announced = run is None  # an experiment says how long all of its trainings will take
    guard = Guard(device, config.clip, amp, run.kept() if run else "")
    history: list[EpochRecord] = []
    best: dict[str, Any] = {"top1": -1.0, "loss": math.inf, "epoch": 0}

    def save() -> None:
        state = {
            **{name: part.state_dict() for name, part in parts.items()},
            "config": config.to_dict(),
            "data": data.fingerprint,
            "history": [asdict(record) for record in history],
            "best": best,
            "rng": processes.from_all(rng_state(device)),
            "batching": [data.train.batch_size, data.train.accumulate],
        }
        run.save(state)

    # ---- resume
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "meter": meter}
    if average:
        parts["average"] = average.module
    if scaler.is_enabled():
        parts["scaler"] = scaler
    saved = run.load(data) if run else None
    if saved is not None:
        with checkpoint.fitting(run.last):
            for name, part in parts.items():
                if name in saved or name != "scaler":  # begun where float16 was not used
                    part.load_state_dict(saved[name])
            history += [EpochRecord(**record) for record in saved["history"]]
            best.update(saved["best"])
            data.train.rebatch(*saved["batching"])
            restore_rng_state(saved["rng"][processes.rank() % len(saved["rng"])], device)
    elif run is not None:
        save()  # proves before the first step that the folder takes it
    farewell = run.farewell if run else lambda: "interrupted; nothing was saved"
    keeper = Keeper(save if run else None, config.save_every, farewell)
    aids = Aids(amp, scaler, average, meter, guard, keeper, on_step)
    epoch = partial(train_one_epoch, trained, data.train, loss_fn, optimizer, schedule, aids)

    with keeper:
        while meter.epoch < config.epochs and not _out_of_patience(history, config.patience):
            # ---- epoch
            title = f"{label} epoch {meter.epoch + 1}".lstrip()
            with_less_memory(epoch, data.train, optimizer, aids, config.auto_batch, title)
            train_loss, train_top1 = meter.means()
            seconds = meter.elapsed()
            if show and meter.epoch == 0 and not data.in_memory:
                data.train.report_waiting(seconds)

            # ---- validate
            processes.share_buffers(model, evaluated)
            val_loss, val_top1 = score(evaluated, data.val)
            guard.settle(val_loss)
            record = EpochRecord(
                epoch=meter.epoch + 1,
                lr=schedule.last_lr,
                train_loss=train_loss,
                train_top1=train_top1,
                val_loss=val_loss,
                val_top1=val_top1,
                seconds=meter.elapsed(),
                images_per_second=data.train.images_per_epoch / seconds,
            )
            history.append(record)
            schedule.epoch_end(val_loss)
            meter.end_epoch()

            # ---- keep
            if (val_top1, -val_loss) > (best["top1"], -best["loss"]):
                best = {"top1": val_top1, "loss": val_loss, "epoch": meter.epoch}
                if run is not None:
                    run.save_best(evaluated, best, data)
            if run is not None:
                run.note_epoch(history, config.epochs)
                meter.announce(record.seconds * config.epochs)
            done = meter.epoch == config.epochs or _out_of_patience(history, config.patience)
            keeper.pause(now=done)
    if run is not None:
        with checkpoint.fitting(run.best):
            model.load_state_dict(run.load_best()["model"])
    elif average:
        model.load_state_dict(average.module.state_dict())
    return history


def _out_of_patience(history: list[EpochRecord], patience: int) -> bool:
    """Whether the lowest validation loss is `patience` epochs ago."""
    if not patience or len(history) <= patience:
        return False
    losses = [record.val_loss for record in history]
    return len(losses) - 1 - losses.index(min(losses)) >= patience
