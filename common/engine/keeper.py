"""What is kept of a run, and when: now and then, at a signal, and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable

from common.engine import processes
from common.engine.errors import Interrupted
from common.engine.signals import StopSignal


class Keeper(StopSignal):
    """Saves every few seconds, and leaves after the step in hand when a signal asks for it.

    Inside `with keeper:` Ctrl-C and SIGTERM only set a flag that `after_step` looks at.

    Args:
        save: writes the whole state; None where nothing is kept.
        every: seconds between two saves within an epoch.
        farewell: the line that says how to go on.
    """

    def __init__(
        self, save: Callable[[], None] | None, every: float, farewell: Callable[[], str]
    ) -> None:
        self.save, self.every, self.farewell = save, every, farewell
        self.last = time.monotonic()

    def after_step(self, step: int) -> None:
        # All processes have to stop and save at the same step; asking each other at every one
        # would cost.
        if processes.world_size() == 1 or step % 10 == 0:
            self.pause()

    def pause(self, now: bool = False) -> None:
        """Save if it is time to, or if a signal came; leave if one came.

        Raises:
            Interrupted: a signal came; all is saved.
        """
        due = now or time.monotonic() - self.last > self.every
        signum, due = processes.largest_of_all(self.signum, int(due))
        if self.save is not None and (signum or due):
            self.save()
            self.last = time.monotonic()
        if signum:
            raise Interrupted(signum, self.farewell())
