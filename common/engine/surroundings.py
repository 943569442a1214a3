"""Where this process runs: a script, a notebook, an editor's window. No torch here."""

from __future__ import annotations

import builtins
import os
import shlex
import shutil
import subprocess
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
        words = [*_launcher(), script(), *(flags or sys.argv[1:])]
        # cmd.exe knows no single quotes, in which shlex puts every word with a backslash.
        return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
    return f"config = parse_flags(Config, {list(flags)})" if flags else "cells of a notebook"


def _launcher() -> list[str]:
    """What runs a script in this shell as it was run: python as it was typed, or torchrun."""
    typed = sys.orig_argv[0] if sys.orig_argv else "python"
    python = "python" if shutil.which("python") == sys.executable else typed
    here = os.environ.get("LOCAL_WORLD_SIZE")
    if here is None:
        return [python]
    # A worker can't see torchrun's own flags; those that join several machines are the user's.
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    flags = ["--standalone"] if nodes == "1" else [f"--nnodes={nodes}"]
    start = ["torchrun"] if shutil.which("torchrun") else [python, "-m", "torch.distributed.run"]
    return [*start, *flags, f"--nproc-per-node={here}"]
