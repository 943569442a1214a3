"""Signals that wait until a step is done."""

from __future__ import annotations

import os
import signal


class StopSignal:
    """Ctrl-C and SIGTERM inside the `with` only set a flag, so that a step can end and be saved.

    A second signal exits at once. Outside the block the handlers are what they were.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> StopSignal:
        try:
            self._before = {
                s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # not the main thread: signals go elsewhere
            self._before = {}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: object) -> None:
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum
