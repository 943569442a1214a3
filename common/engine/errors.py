"""The ways a run ends early on purpose. No torch
here: flags are checked before it is imported.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class UserError(Exception):
    """Bad input or a missing thing: one line that says what, where and what to do. Exit code 2."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [f"error: {self}"]


class Locked(UserError):
    """A file that the system lets us not write now: on Windows another program has it open."""


class Diverged(UserError):
    """The loss or its gradient is no longer finite."""


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop. Exit code 128 + its number: 130, 143 or 129.

    As Python's own for Ctrl-C it is no `Exception`: nobody's `except Exception` may swallow it.
    The message says how to go on; where it is empty, `on_leave`'s callbacks are asked.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """'unknown model resnet19 (did you mean resnet18?); known: ...', to raise."""
    import difflib  # here: errors are imported before a signal can be answered

    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return UserError(f"unknown {what} {name!r}{hint}; known: {', '.join(known)}")
