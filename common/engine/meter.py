"""What is measured while a network trains: where the run stands, sums over images, seconds; and how
its numbers are read without waiting for the GPU.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from common.engine import processes
from common.engine.progress import Bar


class Meter:
    """Counts images, losses and seconds, on the device: the host doesn't wait for a number.

    Attributes:
        epoch: finished epochs. `batch`: finished batches of the next one. Together they say where
            the run stands, and a checkpoint holds both.
        seconds: spent training in the epoch so far, over all runs of it.
    """

    def __init__(self, device: torch.device, epochs: int, show: bool = False) -> None:
        self.epochs, self.show = epochs, show
        self.epoch = self.batch = self.batch_at_step = 0
        self.seconds, self.began = 0.0, time.monotonic()
        # float64 is exact for these sums, but Metal has none.
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, dtype=exact, device=device)  # loss, hits, images
        self.sums_at_step = self.sums.clone()
        self.shown = Lagging(device)
        self.bar = Bar(0, "", show=False)
        self.announced, self.since = False, 0.0

    def begin_epoch(self, bar: Bar) -> None:
        self.bar = bar
        self.began = time.monotonic() - self.seconds

    def count(self, loss: Tensor, output: Tensor | tuple[Tensor, ...], y: Tensor) -> None:
        """After each batch."""
        hits = top1_hits(output, y).to(self.sums.dtype)
        images = torch.full_like(hits, len(y))
        self.sums += torch.stack((loss.detach().to(self.sums.dtype) * images, hits, images))
        self.shown.push(loss.detach())
        self.batch += 1
        note = f"loss {self.shown.value:.3f}" if self.shown.ready else ""
        self.bar.advance(len(y) * processes.world_size(), note)

    def step_taken(self, batches: int) -> None:
        """After each optimizer step; `batches` are those of a whole epoch."""
        self.batch_at_step = self.batch
        self.sums_at_step.copy_(self.sums)
        self._expect(batches)

    def end_epoch(self) -> None:
        self.epoch, self.batch, self.batch_at_step, self.seconds = self.epoch + 1, 0, 0, 0.0
        self.began = time.monotonic()
        self.sums.zero_()
        self.sums_at_step.zero_()

    def means(self) -> tuple[float, float]:
        """Loss and top-1 of the epoch so far, over all processes."""
        total, hits, images = processes.sum_over_processes(self.sums.clone()).tolist()
        return total / max(1, images), hits / max(1, images)

    def elapsed(self) -> float:
        """Seconds of the epoch so far."""
        return time.monotonic() - self.began

    def rewind(self) -> None:
        """Back to the last optimizer step, when the batches since have failed."""
        self.batch, self.seconds = self.batch_at_step, self.elapsed()
        self.sums.copy_(self.sums_at_step)

    def state_dict(self) -> dict[str, Any]:
        sums = processes.sum_over_processes(self.sums.clone()).cpu()
        return {"epoch": self.epoch, "batch": self.batch, "sums": sums, "seconds": self.elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.batch, self.seconds = state["epoch"], state["batch"], state["seconds"]
        self.batch_at_step = self.batch
        self.announced = self.epoch > 0
        if processes.is_main():  # the sums are those of all processes together
            self.sums.copy_(state["sums"])
            self.sums_at_step.copy_(state["sums"])

    def _expect(self, batches: int) -> None:
        """Say once, from the first steps, how long all of it will take.

        The very first steps pay for set-up and don't count. An epoch too short to tell is waited
        for, and so is a GPU, which runs behind the host.
        """
        if not self.show or self.announced or self.shown.asynchronous:
            return
        first, least, now = 5, 10, time.monotonic()
        if self.since == 0 and self.batch >= first:
            self.since, self.first = now, self.batch
        elif self.since and self.batch >= self.first + least and now > self.since + 1:
            per_batch = (now - self.since) / (self.batch - self.first)
            self.announce(per_batch * batches * self.epochs)

    def announce(self, seconds: float) -> None:
        """Print once how many seconds all epochs are expected to take."""
        if not self.show or self.announced or self.epochs == 1:
            return
        self.announced = True
        spoken = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        if seconds >= 7200:
            spoken = f"{seconds / 3600:.1f} h"
        print(f"expected   about {spoken} for {self.epochs} epochs", flush=True)


class Lagging:
    """A number from the device that is read when it has come by itself; on a CPU at once.

    Attributes:
        value: the newest number that has come; `ready` says whether there is one.
        at: what the caller said of it, such as its step.
    """

    def __init__(self, device: torch.device) -> None:
        self.asynchronous = device.type == "cuda"
        self.value, self.ready, self.at, self.asked_at = 0.0, False, 0, 0
        self.event = None
        if self.asynchronous:
            self.host = torch.zeros((), pin_memory=True)

    def push(self, number: Tensor, at: int = 0) -> None:
        if not self.asynchronous:
            self.value, self.ready, self.at = float(number), True, at
            return
        if self.event is not None and self.event.query():
            self.take()
        if self.event is None:
            self.host.copy_(number, non_blocking=True)
            self.event, self.asked_at = torch.cuda.Event(), at
            self.event.record()

    def take(self) -> None:
        """Read the number that is on its way, waiting for it if need be."""
        if self.event is not None:
            self.event.synchronize()
            self.value, self.ready, self.at = float(self.host), True, self.asked_at
            self.event = None


def top1_hits(output: Tensor | tuple[Tensor, ...], y: Tensor) -> Tensor:
    """How many of a batch are right, as a 0-d tensor; mixed labels count by their larger share."""
    logits = output[0] if isinstance(output, tuple) else output
    labels = y.argmax(1) if y.dim() > 1 else y
    return (logits.argmax(1) == labels).sum()
