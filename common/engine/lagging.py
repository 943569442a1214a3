"""Numbers that a GPU has computed, read without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


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
