"""How a process is stopped and how it leaves. No torch here: a signal may come while torch is
being imported.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager, suppress

from common.engine.errors import Interrupted

TYPE_CHECKING = False  # typing's own would take as long to import as all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import NoReturn

# Ctrl-C, the request of a cluster or a service manager, a terminal that is closed (not on Windows).
STOPPING = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
COURSE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NOTHING_YET = "stopped before anything was saved: there is nothing to resume"

_callbacks: list[Callable[[], str | None]] = []
_agree: Callable[[str, int, BaseException | None], NoReturn] | None = None
_came = 0  # the signal that asked this process to stop
_held = 0  # blocks in which it has to wait
_caught = 0  # blocks that turn `Interrupted` into a line and an exit code
_owner = 0  # the process that these handlers are of; a fork inherits them


# ---------------------------------------------------------------------------------------- leaving


def on_leave(callback: Callable[[], str | None]) -> Callable[[], str | None]:
    """Have `callback()` called when the process leaves, however it does; usable as a decorator.

    Where a signal stopped it, the text that the latest of the callbacks returns is told to the
    user: how to go on. None leaves that to the others.
    """
    if callback not in _callbacks:
        _callbacks.append(callback)
    return callback


def leave() -> str:
    """Call them all, the latest first; the line for a user who stopped the process."""
    lines = [line for callback in reversed(_callbacks) if (line := callback())]
    return lines[0] if lines else NOTHING_YET


def agree_by(agree: Callable[[str, int, BaseException | None], NoReturn]) -> None:
    """Where several processes work on one run, `agree` ends them all alike."""
    global _agree
    _agree = agree


def agreed(line: str, code: int, error: BaseException | None = None) -> None:
    """Before this process leaves for a reason: where it isn't alone, this doesn't return."""
    if _agree is not None:
        _agree(line, code, error)


def say(line: str, everywhere: bool = False) -> None:
    """`line` on stderr; where several processes would say the same, by the first of a machine."""
    if not line or not (everywhere or os.environ.get("LOCAL_RANK", "0") == "0"):
        return
    # Closed, or on a disk that is full: the exit code has to do.
    with suppress(AttributeError, OSError, ValueError):
        print("\r" + line if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------- signals


def in_script() -> bool:
    """Whether this process was started to run one of the lessons, and not by a worker's parent."""
    script = sys.argv[0] if sys.argv and sys.argv[0] in sys.orig_argv else ""
    return os.path.dirname(os.path.abspath(script)) == COURSE and script.endswith(".py")


def catch() -> dict[int, object]:
    """Handle the signals that stop a process from now on; returns the handlers of before.

    Nothing changes off the main thread, which signals never reach.
    """
    global _owner
    before: dict[int, object] = {}
    for signum in STOPPING:
        handler = signal.getsignal(signum)
        hung_up = signum not in (signal.SIGINT, signal.SIGTERM)
        if handler is _stop or (hung_up and handler == signal.SIG_IGN):  # nohup
            continue
        with suppress(ValueError):  # not the main thread
            signal.signal(signum, _stop)
            before[signum] = handler
    _owner = os.getpid()
    return before


def release(before: dict[int, object]) -> None:
    """Undo `catch`."""
    global _came
    for signum, handler in before.items():
        signal.signal(signum, handler)
    if before:
        _came = 0


def leave_signals_to_the_main_process() -> None:
    """For a worker process: a signal to the whole group is answered by the process that works for
    the user. That one ends its workers itself, with SIGTERM.
    """
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.SIG_IGN)


@contextmanager
def caught() -> Iterator[None]:
    """Inside, a signal raises `Interrupted`; the caller turns it into a line and an exit code."""
    global _caught, _held, _came
    before, hook = catch(), sys.unraisablehook

    def unless_stopped(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, Interrupted):
            hook(lost)

    sys.unraisablehook = unless_stopped
    _caught += 1
    try:
        yield
        raise_if_stopped()  # an exception in a destructor is lost, the signal isn't
    finally:
        sys.unraisablehook = hook
        _caught -= 1
        if not _caught:
            _held = _came = 0
        release(before)


@contextmanager
def stop_says(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """A stop inside says this line instead of those of `on_leave`.

    Raises:
        Interrupted: Ctrl-C or a signal.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        raise Interrupted(signum, how_to_go_on()) from None


def raise_if_stopped() -> None:
    if _came and not _held:
        raise Interrupted(_came)


class StopSignal:
    """Inside the `with` a signal only sets `signum`, so that a step can end and be saved; the end
    of the block raises `Interrupted`. A second signal exits at once.

    Raises:
        Interrupted: at the end of the outermost of such blocks.
    """

    @property
    def signum(self) -> int:
        return _came

    def __enter__(self) -> StopSignal:
        global _held
        self._before = catch()
        _held += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        global _held
        _held = max(0, _held - 1)
        came = _came
        release(self._before)
        if came and kind is None and not _held:
            raise Interrupted(came)


def _stop(signum: int, frame: FrameType | None) -> None:
    global _came
    if os.getpid() != _owner or _came:  # a worker; or asked for the second time
        os._exit(128 + signum)
    _came = signum
    if _held:
        return
    if _caught:
        raise Interrupted(signum)
    # While modules are imported, or after the last line: an exception would end in a traceback.
    say(leave())
    os._exit(128 + signum)
