"""Processes that begin with torch imported: real ones, to signal and to kill, five seconds sooner.

multiprocessing's fork server imports what is large and foreign, once; each process is forked from
it and imports the course itself.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    "torch._dynamo torchvision.transforms.v2 torchvision.datasets sklearn.datasets "
    "sklearn.linear_model sklearn.metrics matplotlib.figure".split()
)


class Warm:
    """`python ARGV` of the course's folder, its output in `folder`; `-c TEXT` as Python's own."""

    def __init__(self, folder: Path, *argv: str, cwd: Path = ROOT, **environment: str) -> None:
        number = len(list(folder.glob("out*")))
        self.out, self.err = folder / f"out{number}", folder / f"err{number}"
        for path in (self.out, self.err):
            path.write_text("")
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when the server imports torch
        arguments = ([str(part) for part in argv], str(cwd), environment, self.out, self.err)
        self.process = CONTEXT.Process(target=_become, args=arguments)
        self.process.start()

    def wait_for(self, word: str, seconds: float = 60) -> None:
        """Until it has printed `word`, or complains, or is gone."""
        deadline = time.monotonic() + seconds
        while word not in self.out.read_text() and time.monotonic() < deadline:
            time.sleep(0.002)
            if self.err.read_text() or not self.process.is_alive():
                break

    def kill(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def join(self, seconds: float = 200) -> tuple[int, str, str]:
        """(exit code, standard output, standard error); -number where a signal ended it."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        assert code is not None, f"still at work after {seconds} s: {self.err.read_text()}"
        return code, self.out.read_text(), self.err.read_text()


def _become(argv: list[str], cwd: str, environment: dict, out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(environment)
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)  # its own children start as a script's do
    if argv[0] == "-c":
        sys.argv, sys.path[0:0] = ["-c", *argv[2:]], [cwd]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0:0] = argv, [str(Path(argv[0]).resolve().parent)]
        runpy.run_path(argv[0], run_name="__main__")
