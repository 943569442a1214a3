"""The training loop. `train_one_epoch` is the whole of it; the rest is what it stands on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common.config import TrainConfig
from common.data import Data, Loader, num_workers
from common.engine import processes
from common.engine.device import amp_dtype, autocast, restore_rng_state, rng_state
from common.engine.errors import Diverged, Interrupted, UserError
from common.engine.progress import Bar
from common.engine.records import EpochRecord
from common.engine.signals import StopSignal

if TYPE_CHECKING:
    from common.runs import Run


def train_one_epoch(
    model: nn.Module,
    loader: Loader,
    loss_fn: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
    scaler: torch.amp.GradScaler,
    watch: Watch,
) -> None:
    """One pass over the training images, from where `watch` says that the last run stopped."""
    model.train()
    for x, y in loader.batches(watch.epoch, start=watch.batch):
        step_now = (watch.batch + 1) % loader.accumulate == 0
        with processes.gradient_sync(model, last=step_now):
            with autocast(x.device, watch.amp):
                output = model(x)  # (N, num_classes), or a tuple that begins with it
                loss = loss_fn(output, y)
            scaler.scale(loss / loader.accumulate).backward()
        watch.count(loss, output, y)  # on the device: the host doesn't wait for a number
        if step_now:
            scaler.unscale_(optimizer)
            watch.check(loss, optimizer)  # before the step, so that a NaN never reaches the weights
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        watch.after_batch(step_now)  # the bar, the average of the weights, signals, checkpoints


# ------------------------------------------------------------------------- what the loop is made of


def make_optimizer(model: nn.Module, config: TrainConfig) -> SGD:
    """SGD with Nesterov momentum; fused, one kernel for all weights, where the device has it."""
    return SGD(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        fused=all(p.device.type in ("cpu", "cuda") for p in model.parameters()),
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels, none for biases and norms.  He et al. 2019, "Bag of
    tricks", sec. 2.

    A norm's scale and a bias are vectors: pulling them to zero switches channels off instead of
    smoothing.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


class Schedule:
    """The learning rate at each optimizer step: a linear warm-up to the peak, then the shape that
    `kind` names.

    - cosine: half a cosine down to zero.  Loshchilov and Hutter 2017
    - onecycle: up for 30% of the run, from a 25th of the peak, then a cosine down.  Smith and Topin
      2018
    - step: a tenth after half and after three quarters of the run.  He et al. 2015, sec. 4.2
    - plateau: a tenth whenever the validation loss has not fallen for 3 epochs
    - constant: the peak

    Every parameter group keeps its own peak, so that groups may learn at different rates.
    """

    FACTOR, PATIENCE = 0.1, 3

    def __init__(self, optimizer: Optimizer, kind: str, steps: int, warmup_steps: int = 0) -> None:
        self.optimizer, self.kind, self.steps, self.warmup_steps = (
            optimizer,
            kind,
            steps,
            warmup_steps,
        )
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.taken, self.plateaus, self.best, self.waited = 0, 0, math.inf, 0
        self._apply()

    def factor(self, step: int) -> float:
        """Share of the peak at optimizer step `step`, counted from 0."""
        if step < self.warmup_steps and self.kind != "onecycle":
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if self.kind == "onecycle":
            rise, start = 0.3, 1 / 25
            done = step / max(1, self.steps)
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
        return {
            k: getattr(self, k) for k in ("peaks", "taken", "plateaus", "best", "waited", "steps")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._apply()


def make_schedule(optimizer: Optimizer, config: TrainConfig, loader: Loader) -> Schedule:
    steps_per_epoch = len(loader) // loader.accumulate
    return Schedule(
        optimizer,
        config.schedule,
        steps=config.epochs * steps_per_epoch,
        warmup_steps=round(config.warmup * steps_per_epoch),
    )


def top1_hits(output: Tensor | tuple[Tensor, ...], y: Tensor) -> Tensor:
    """How many of a batch are right, as a 0-d tensor; mixed labels count by their larger share."""
    logits = output[0] if isinstance(output, tuple) else output
    labels = y.argmax(1) if y.dim() > 1 else y
    return (logits.argmax(1) == labels).sum()


@dataclass
class Watch:
    """What goes on beside the arithmetic of an epoch: sums, safety, progress. Survives in
    checkpoints.

    `epoch` counts finished epochs, `batch` finished batches of the next one: together, where the
    run stands.
    """

    model: nn.Module
    config: TrainConfig
    schedule: Schedule
    amp: torch.dtype | None
    batches: int  # per epoch
    images: int  # per batch, over all processes
    run: Run | None = None
    average: AveragedModel | None = None
    show: bool = True
    epoch: int = 0
    batch: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    trace: dict[str, list[Tensor]] | None = (
        None  # loss and first-layer gradient norm per step, if asked for
    )
    seconds: float = 0.0  # spent training in the epoch so far, over all runs

    def __post_init__(self) -> None:
        first = next(self.model.parameters())
        # float64 is exact for these sums, but Metal has none.
        self.sums = self.sums.to(
            first.device, torch.float32 if first.device.type == "mps" else torch.float64
        )
        self.sums_at_step = self.sums.clone()
        self.failed = torch.zeros((), dtype=torch.bool, device=first.device)
        self.stop = StopSignal()
        self.finite = _Lagging(first.device)
        self.shown = _Lagging(first.device)
        self.bar: Bar | None = None
        self.save: Callable[[], None] | None = None  # set by fit
        self.began = self.last_save = time.monotonic()
        self.since, self.announced = 0.0, False

    # -- called by the loop

    def count(self, loss: Tensor, output: Tensor | tuple[Tensor, ...], y: Tensor) -> None:
        hits = top1_hits(output, y).to(self.sums.dtype)
        images = torch.full_like(hits, len(y))
        self.sums += torch.stack((loss.detach().to(self.sums.dtype) * images, hits, images))
        self.shown.push(loss.detach())

    def check(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Stop before the optimizer step when the loss or the gradient is not finite.

        On the CPU the answer is there at once. On a GPU it is asked for and read a few steps later,
        since waiting for it would idle the device; until then the fused optimizer is told to skip
        its steps.
        """
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        limit = self.config.clip or math.inf
        norm = (
            nn.utils.clip_grad_norm_(parameters, limit)
            if self.config.clip
            else nn.utils.get_total_norm([p.grad for p in parameters])
        )
        if self.trace is not None:
            self.trace["loss"].append(loss.detach().clone())
            self.trace["first_layer_gradient"].append(parameters[0].grad.norm())
        # float16's GradScaler meets infinite gradients as a matter of course: it skips the step and
        # halves its scale. A loss that isn't finite it can't mend.
        number = loss.detach() if self.amp == torch.float16 else loss.detach() + norm
        bad = ~torch.isfinite(number)
        self.failed |= bad
        if self.amp != torch.float16 and self.finite.asynchronous:
            optimizer.grad_scale, optimizer.found_inf = None, self.failed.to(torch.float32)
        self.finite.push(self.failed.to(torch.float32), at=self.schedule.taken + 1)
        if self.finite.value:
            self._refuse()

    def after_batch(self, step_taken: bool) -> None:
        self.batch += 1
        if self.bar is not None:
            self.bar.advance(
                self.images, f"loss {self.shown.value:.3f}" if self.shown.ready else ""
            )
        if not step_taken:
            return
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.sums_at_step.copy_(self.sums)
        self._announce()
        # All processes have to stop and save at the same step; asking each other at every one would
        # cost.
        if processes.world_size() == 1 or self.schedule.taken % 10 == 0:
            self.pause()

    def pause(self) -> None:
        """Save if it is time to, or if a signal came; leave if one came."""
        overdue = time.monotonic() - self.last_save > self.config.save_every
        signum, overdue = processes.largest_of_all(self.stop.signum, int(overdue))
        if self.save is not None and (signum or overdue):
            self.save()
            self.last_save = time.monotonic()
        if signum:
            raise Interrupted(
                signum, self.run.farewell() if self.run else "interrupted; nothing was saved"
            )

    # -- called by fit

    def begin_epoch(self) -> None:
        self.began = time.monotonic() - self.seconds

    def end_epoch(self) -> None:
        self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()
        self.sums_at_step.zero_()

    def means(self) -> tuple[float, float]:
        """Loss and top-1 of the epoch so far, over all processes."""
        total, hits, images = processes.sum_over_processes(self.sums.clone()).tolist()
        return total / max(1, images), hits / max(1, images)

    def rewind(self, accumulate: int) -> None:
        """Back to the last optimizer step, when the batches since have failed."""
        self.batch -= self.batch % accumulate
        self.sums.copy_(self.sums_at_step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "sums": processes.sum_over_processes(self.sums.clone()).cpu(),
            "seconds": time.monotonic() - self.began,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.batch, self.seconds = state["epoch"], state["batch"], state["seconds"]
        if processes.is_main():  # the sums are those of all processes together
            self.sums.copy_(state["sums"])
            self.sums_at_step.copy_(state["sums"])

    def _announce(self) -> None:
        """Once, from the first steps: how long all of it will take.

        The very first pay for set-up and don't count. An epoch too short to tell is waited for, and
        so is a GPU, which runs behind the host: see `fit`.
        """
        wanted = self.run is not None and self.show and not self.announced and self.epoch == 0
        if not wanted or self.finite.asynchronous:
            return
        first, least, now = 5, 10, time.monotonic()
        if self.batch == first:
            self.since = now
        elif self.since and self.batch >= first + least and now > self.since + 1:
            per_batch = (now - self.since) / (self.batch - first)
            announce_time(per_batch * self.batches * self.config.epochs, self.config.epochs)
            self.announced = True

    def _refuse(self) -> None:
        lr = self.schedule.optimizer.param_groups[0]["lr"]
        where = f"epoch {self.epoch + 1}, step {self.finite.at}, learning rate {lr:.3g}"
        kept = f"; the last good state is in {self.run.folder}" if self.run else ""
        raise Diverged(
            f"the loss or its gradient is no longer finite ({where}){kept}: try --lr "
            f"{lr / 10:.2g}, "
            "--clip 1 or a longer --warmup"
        )


class _Lagging:
    """A number from the device that is read when it has
    come by itself, so that the host never waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.asynchronous = device.type == "cuda"
        self.value, self.ready, self.at = 0.0, False, 0
        self.event = None
        if self.asynchronous:
            self.host = torch.zeros((), pin_memory=True)

    def push(self, number: Tensor, at: int = 0) -> None:
        if not self.asynchronous:
            self.value, self.ready, self.at = float(number), True, at
            return
        if self.event is not None and self.event.query():
            self.value, self.ready, self.at, self.event = (
                float(self.host),
                True,
                self.asked_at,
                None,
            )
        if self.event is None:
            self.host.copy_(number, non_blocking=True)
            self.event, self.asked_at = torch.cuda.Event(), at
            self.event.record()


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
    trace: dict[str, list[Tensor]] | None = None,
) -> list[EpochRecord]:
    """Train for `config.epochs`, validating after each; `model` ends with the weights of the best
    epoch.

    The best epoch is the one of the highest validation accuracy, the lower loss where two are
    equal. With a `run` everything is saved there and a run that was stopped goes on where it was,
    to the same weights. Without one nothing is written, and the weights are those of the last
    epoch.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after the step in hand is finished and saved.
        Diverged: the loss is no longer finite.
        UserError: the disk is full, memory is out.
    """
    device = next(model.parameters()).device
    amp = amp_dtype(device, config.amp, config.image_size)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    average = None
    if config.ema:
        average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True
        )
    wrapped = processes.parallel(model, device, config.sync_bn)
    faster = torch.compile(wrapped) if config.compile else wrapped
    watch = Watch(
        model,
        config,
        schedule,
        amp,
        len(data.train),
        data.train.batch_size * processes.world_size(),
        run,
        average,
    )
    watch.trace = trace
    history: list[EpochRecord] = []
    best: dict[str, Any] = {"top1": -1.0, "loss": math.inf, "epoch": 0}

    def state() -> dict[str, Any]:
        return {
            "config": config.to_dict(),
            "data": data.fingerprint,
            "model": model.state_dict(),
            "average": average.state_dict() if average else None,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "scaler": scaler.state_dict(),
            "watch": watch.state_dict(),
            "history": [asdict(record) for record in history],
            "best": best,
            "rng": processes.from_all(rng_state(device)),
            "batching": [data.train.batch_size, data.train.accumulate],
        }

    if run is not None:
        saved = run.load(data)
        if saved is not None:
            model.load_state_dict(saved["model"])
            if average:
                average.load_state_dict(saved["average"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            scaler.load_state_dict(saved["scaler"])
            watch.load_state_dict(saved["watch"])
            history += [EpochRecord(**record) for record in saved["history"]]
            best.update(saved["best"])
            data.train.batch_size, data.train.accumulate = saved["batching"]
            restore_rng_state(saved["rng"][processes.rank() % len(saved["rng"])], device)
        watch.save = lambda: run.save(state())
        if saved is None:
            watch.save()  # also proves, before the first step, that the folder takes it

    evaluated = average.module if average else model
    watch.show = bool(label or run) and processes.is_main()
    with watch.stop:
        while watch.epoch < config.epochs and not _out_of_patience(history, config.patience):
            watch.begin_epoch()
            name = f"{label} " if label else ""
            _train_epoch(
                faster,
                data.train,
                loss_fn,
                optimizer,
                schedule,
                scaler,
                watch,
                f"{name}epoch {watch.epoch + 1}",
            )
            train_loss, train_top1 = watch.means()
            train_seconds = time.monotonic() - watch.began
            if not data.in_memory and watch.show and not watch.epoch:
                print(which_is_slower(data.train.waited / train_seconds, num_workers(config)))
            processes.share_buffers(model)
            val_loss, val_top1 = score(evaluated, data.val, amp)
            record = EpochRecord(
                epoch=watch.epoch + 1,
                lr=optimizer.param_groups[0]["lr"],
                train_loss=train_loss,
                train_top1=train_top1,
                val_loss=val_loss,
                val_top1=val_top1,
                seconds=time.monotonic() - watch.began,
                images_per_second=len(data.train) * watch.images / train_seconds,
            )
            history.append(record)
            schedule.epoch_end(val_loss)
            watch.end_epoch()
            if (val_top1, -val_loss) > (best["top1"], -best["loss"]):
                best = {"top1": val_top1, "loss": val_loss, "epoch": record.epoch}
                if run is not None:
                    run.save_best(evaluated, best, data)
            if run is not None:
                run.note_epoch(history, config.epochs)
                if watch.epoch == config.epochs:
                    watch.last_save = -math.inf  # save now, whenever the last time was
            watch.pause()
            if run and watch.show and not watch.announced and config.epochs > 1:
                announce_time(record.seconds * config.epochs, config.epochs)
                watch.announced = True
    if run is not None:
        model.load_state_dict(run.load_best()["model"])
    return history


def _train_epoch(
    model: nn.Module,
    loader: Loader,
    loss_fn: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
    scaler: torch.amp.GradScaler,
    watch: Watch,
    label: str,
) -> None:
    """`train_one_epoch` under a bar; when CUDA's memory
    is out, again with half the batch and twice as many.
    """
    while True:
        done, total = watch.batch * watch.images, len(loader) * watch.images
        try:
            with Bar(total, label, "img", done, show=watch.show) as watch.bar:
                return train_one_epoch(model, loader, loss_fn, optimizer, schedule, scaler, watch)
        except UserError as error:
            # SIGTERM to the whole process group: the workers died of it before the step was done.
            if watch.stop.signum and watch.run is not None and "worker process" in str(error):
                raise Interrupted(watch.stop.signum, watch.run.farewell()) from None
            raise
        except torch.OutOfMemoryError as error:
            advice = (
                "try a smaller --batch-size with a larger --accumulate, or a smaller --image-size"
            )
            if not watch.config.auto_batch or processes.world_size() > 1 or loader.batch_size % 2:
                raise UserError(
                    f"out of memory with {loader.batch_size} images a batch: {advice}"
                ) from error
        # Outside the except clause, which would hold on to the failed step's tensors.
        watch.rewind(loader.accumulate)
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        loader.halve_batches()
        watch.batch, watch.batches, watch.images = 2 * watch.batch, len(loader), watch.images // 2
        print(
            f"out of memory: going on with --batch-size {loader.batch_size} --accumulate "
            f"{loader.accumulate}, "
            "the same images per step",
            flush=True,
        )


def announce_time(seconds: float, epochs: int) -> None:
    spoken = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    if seconds >= 7200:
        spoken = f"{seconds / 3600:.1f} h"
    print(f"expected   about {spoken} for {epochs} epochs", flush=True)


def which_is_slower(share: float, workers: int) -> str:
    """Whether reading images or computing limits the run, from the share of time spent waiting."""
    if share < 0.1:
        return (
            f"input      images come in time: {share:.0%} of the epoch was spent waiting for them"
        )
    advice = f"more --workers (now {workers}), smaller files or a faster disk would help"
    slow = f"reading images is the bottleneck: {share:.0%} of the epoch was waiting"
    return f"input      {slow}; {advice}"


def _out_of_patience(history: list[EpochRecord], patience: int) -> bool:
    """Whether the lowest validation loss is `patience` epochs ago."""
    if not patience or len(history) <= patience:
        return False
    losses = [record.val_loss for record in history]
    return len(losses) - 1 - losses.index(min(losses)) >= patience


@torch.inference_mode()
def score(model: nn.Module, loader: Loader, amp: torch.dtype | None = None) -> tuple[float, float]:
    """Mean cross-entropy and top-1 of a split, each image counted once, over all processes."""
    mode = model.training
    model.eval()
    sums = None
    for x, y in loader.batches():
        with autocast(x.device, amp):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y, reduction="sum")
        batch = torch.stack(
            (loss, (logits.argmax(1) == y).sum().to(loss), torch.full_like(loss, len(y)))
        )
        sums = batch if sums is None else sums + batch
    model.train(mode)
    if sums is None:  # more processes than images
        sums = torch.zeros(3, device=loader.device)
    total, hits, images = processes.sum_over_processes(sums).tolist()
    return total / images, hits / images
