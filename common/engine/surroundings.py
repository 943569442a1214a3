"""Where this process runs: a script, a notebook, an editor's window. No torch here."""

from __future__ import annotations

import builtins
import shlex
import sys
from pathlib import Path


def in_notebook() -> bool:
    """Whether a Jupyter kernel or IPython runs this: it
    has no command line of its own and must not be exited.
    """
    return hasattr(builtins, "__IPYTHON__")


def script() -> str:
    """The script that runs, as it was typed. Empty for the cells of a notebook or of an editor,
    where the command line is that of the kernel.
    """
    file = getattr(sys.modules["__main__"], "__file__", None) or ""
    if in_notebook() and Path(file).name != Path(sys.argv[0]).name:
        return ""
    return sys.argv[0]


def command(*flags: str) -> str:
    """The line that was typed, or with `flags` the one that goes on; in a notebook, what sets it to
    them.
    """
    if script():
        return shlex.join(["python", script(), *(flags or sys.argv[1:])])
    return f"config = parse_flags(Config, {list(flags)})" if flags else "cells of a notebook"
