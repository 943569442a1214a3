"""Progress of long work: a tqdm bar on a terminal,
a plain line now and then where there is none, as in a notebook, which keeps all that is printed.
"""

from __future__ import annotations

import sys
import time


class Bar:
    """`with Bar(total, "epoch 1/15", "images") as bar: bar.advance(64, "loss 0.31")`.

    Args:
        total: units of the whole work.
        label: what is being done.
        unit: of the total; "B" counts bytes.
        done: units done before.
        seconds: between two plain lines.
    """

    def __init__(
        self,
        total: int,
        label: str,
        unit: str = "it",
        done: int = 0,
        seconds: float = 30.0,
        show: bool = True,
    ) -> None:
        self.total, self.label, self.done, self.seconds = total, label, done, seconds
        self.started = self.last = time.monotonic()
        self.first = done
        self.show = show
        self.bar = None
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total or None,
                initial=done,
                desc=label,
                unit=unit,
                unit_scale=True,
                leave=False,
                dynamic_ncols=True,
            )

    def advance(self, units: int = 1, note: str = "") -> None:
        self.done += units
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(units)
        elif self.show and time.monotonic() - self.last > self.seconds:
            self.last = time.monotonic()
            share = f"{self.done / self.total:4.0%}" if self.total else f"{self.done}"
            each = (self.last - self.started) / max(1, self.done - self.first)
            left = max(0, each * (self.total - self.done))
            after = f", about {left:.0f} s left" if self.total else ""
            print(f"{self.label}: {share}{after} {note}".rstrip(), flush=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
