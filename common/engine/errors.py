"""The ways a run ends early on purpose. No torch
here: flags are checked before it is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input or a missing thing: one line that says what, where and what to do. Exit code 2."""


class Diverged(UserError):
    """The loss or its gradient is no longer finite. `losses` are those of the steps before, where
    they were kept.
    """

    losses: list[float] = []


class Interrupted(Exception):
    """Ctrl-C or SIGTERM. Exit code 128 + signal number: 130 or 143."""

    def __init__(self, signum: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.signum = signum


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """'unknown model resnet19 (did you mean resnet18?); known: ...', to raise."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return UserError(f"unknown {what} {name!r}{hint}; known: {', '.join(known)}")
