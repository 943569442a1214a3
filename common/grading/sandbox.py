"""Somebody else's code in a process of its own: questioned, limited and killed from outside.

Three processes take part. The **parent** (the grader) asks questions and keeps the scores; it never
runs a student's code and never unpickles what it is sent. The **host** is a small helper that
imports torch once and forks, because importing torch takes seconds and forking takes milliseconds.
Each **worker** is such a fork: a session and process group of its own, with limits, an empty
folder, no way to reach the host's connection and, where the grader runs as root, an unprivileged
user of its own and no network. It answers questions until the parent kills it, with everything it
has started. What this stops, and what it does not, is in docs/GRADING.md.

On Linux the host imports torch before it forks; on macOS, where a fork after Apple's frameworks
have started is unsafe, each worker imports it for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import io
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NoReturn

from common.grading import confinement

try:
    import fcntl
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[2]
LINUX = sys.platform.startswith("linux")
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Limits:
    """What one worker may take.

    Seconds of computing, so that a busy machine takes nothing from a student; `patience` times as
    many may pass on the wall clock, for code that sleeps. `lesson_seconds` are of the wall clock:
    hosts stop an autograder by it.
    """

    import_seconds: float = 20.0
    case_seconds: float = 20.0
    patience: float = 4.0
    lesson_seconds: float = 240.0
    memory_mb: int = 1000  # of all its processes; torch's own libraries, mapped files, don't count
    processes: int = 64  # processes and threads together
    file_mb: int = 16  # of each file that it writes
    output_kb: int = 16  # of what it prints, the rest is thrown away
    answer_mb: int = 32


class WorkerLost(Exception):
    """The worker died or was stopped, so it can't answer any more."""


class SandboxUnavailable(RuntimeError):
    """This machine can't isolate a submission."""


def require_platform() -> None:
    """Raises: SandboxUnavailable, where processes can't be forked and limited."""
    if resource is None or not hasattr(os, "fork"):
        raise SandboxUnavailable(
            f"marking needs fork and resource limits, which {sys.platform} does not have: "
            "use Linux, macOS, WSL or the container of docs/GRADING.md"
        )


# ----------------------------------------------------------------------------------- the parent


class Host:
    """The parent's end of one host process, which runs one worker at a time. It runs the imports
    `preload` before it forks, so that no worker pays for them.
    """

    process: subprocess.Popen[bytes] | None = None
    control: socket.socket
    home: Path  # holds the workers' course and the folder of each worker
    # Whether workers run as a user of their own, and whether they may open only what they need:
    # known after the first.
    own_user: bool | None = None
    confined: bool | None = None

    def __init__(self, preload: Sequence[str], limits: Limits) -> None:
        require_platform()
        self.limits = limits
        self.preload = preload if LINUX else ()
        self.cleanup = contextlib.ExitStack()

    def start(self) -> None:
        """Start the host process, unless it runs."""
        if self.process is not None and self.process.poll() is None:
            return
        self.close()
        self.home = Path(tempfile.mkdtemp(prefix="grader-"))
        self.cleanup.callback(shutil.rmtree, self.home, ignore_errors=True)
        self.control, theirs = socket.socketpair()
        kept = "PATH LANG LC_ALL LD_LIBRARY_PATH DYLD_LIBRARY_PATH TMPDIR VIRTUAL_ENV".split()
        environment = {k: v for k, v in os.environ.items() if k in kept}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        for library in ("OMP", "MKL", "OPENBLAS", "VECLIB_MAXIMUM", "NUMEXPR"):
            environment[f"{library}_NUM_THREADS"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, str(theirs.fileno()), *self.preload],
            cwd=self.home,
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()
        for undo in (self.process.wait, self.process.kill, self.control.close):  # the last first
            self.cleanup.callback(undo)
        self.home.chmod(0o755)
        copy_course(self.home / "course")
        self.control.sendall(b"!")

    def fork(self) -> tuple[int, socket.socket, int, Path]:
        """A new worker: its process id, the socket to question it, what it prints, its folder.

        Raises: SandboxUnavailable, if it can't be had twice in a row: never a submission's fault.
        """
        for _ in range(2):
            self.start()
            folder = Path(tempfile.mkdtemp(prefix="submission-", dir=self.home))
            questions, theirs = socket.socketpair()
            output, their_output = os.pipe()
            request = {"folder": str(folder), "limits": asdict(self.limits)}
            worker = self.request(request, [theirs.fileno(), their_output])
            theirs.close()
            os.close(their_output)
            if worker:
                self.own_user, self.confined = worker["own_user"], worker["confined"]
                return worker["pid"], questions, output, folder
            questions.close()
            os.close(output)
        raise SandboxUnavailable(
            "the grader's helper process can't start a worker; its own error is above"
        )

    def request(self, request: dict[str, Any], fds: list[int] | None = None) -> dict[str, Any]:
        """What the host answers. {} if it is gone: then the next worker gets a new one."""
        message = json.dumps(request).encode()
        try:
            if fds:
                socket.send_fds(self.control, [message], fds)
            else:
                self.control.sendall(message)
            with self.control.makefile("rb") as answer:
                return json.loads(answer.readline())
        except (OSError, ValueError):
            self.close()
            return {}

    def close(self) -> None:
        self.cleanup.close()


# The host waits for its copy of the course, and clears away if the parent was killed meanwhile.
_BOOT = """
import os, shutil, socket, sys
control = socket.socket(fileno=int(sys.argv[1]))
if not control.recv(1):
    shutil.rmtree(os.getcwd(), ignore_errors=True)
    os._exit(0)
os.chdir("course")
sys.path[0] = os.getcwd()
from common.grading.sandbox import serve
serve(control, sys.argv[2:])
os._exit(0)
"""


def copy_course(to: Path) -> None:
    """What workers need of the course: `common/` and the lessons, without the exercises' bodies and
    what is compiled of them; of the grader only what runs in a worker.
    """
    from common.grading.exercises import exercises, lesson_path, manifests
    from common.grading.holes import take_out

    modules = "__init__ confinement holes loading mutants probes sandbox weights".split()
    of_grader = {f"{name}.py" for name in modules}
    changed = {lesson_path(lesson).stem for lesson in manifests()}

    def left_out(folder: str, names: list[str]) -> set[str]:
        if Path(folder) == ROOT / "common" / "grading":
            return set(names) - of_grader
        return {name for name in names if name.endswith(".pyc") and name.split(".")[0] in changed}

    shutil.copytree(ROOT / "common", to / "common", ignore=left_out)
    for lesson in manifests():
        path = lesson_path(lesson)
        text = take_out(path.read_text(encoding="utf-8"), list(exercises(lesson).values()))
        (to / path.relative_to(ROOT)).write_text(text, encoding="utf-8")
    for path in (to, *to.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


class Worker:
    """One worker and the questions to it. All methods raise WorkerLost, when the worker died, lied
    about the protocol or went over a limit.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.limits = host.limits
        self.pid, self.socket, self.output, self.folder = host.fork()
        self.socket.setblocking(False)
        os.set_blocking(self.output, False)
        self.readers = [self.socket, self.output]
        self.printed = b""
        self.closed = False

    def ask(
        self, question: dict[str, Any], seconds: float, deadline: float = float("inf")
    ) -> dict[str, Any]:
        """The worker's answer, plain JSON data: to be judged, never to be trusted. It may take so
        many seconds of computing, and must be there at the deadline, by `time.monotonic()`.
        """
        # An answer must repeat this number: a submission can't lay out answers before it is asked.
        number = secrets.token_hex(8)
        self.allowed, self.computed_before = seconds, None
        self.deadline = min(deadline, time.monotonic() + seconds * self.limits.patience)
        try:
            answer = json.loads(self._exchange(json.dumps({**question, "number": number})))
            if not isinstance(answer, dict) or answer.pop("number", None) != number:
                raise ValueError
            return answer
        except (ValueError, RecursionError):
            raise WorkerLost("the submission interfered with the grader's connection") from None
        except OSError:
            self._died()

    def close(self) -> None:
        """Kill the worker and everything it has started, and remove its folder."""
        if self.closed:
            return
        self.closed = True
        for kill in (os.killpg, os.kill):  # it may not have become the leader of its group yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)
        # Minus the signal that ended it; None if the host is gone.
        self.code: int | None = self.host.request({"reap": self.pid}).get("code")
        with contextlib.suppress(OSError):
            self._drain()
        self.socket.close()
        os.close(self.output)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _exchange(self, question: str) -> bytearray:
        """Send it, receive one line. Reads the output meanwhile, and enforces every limit."""
        to_send, received = question.encode() + b"\n", bytearray()
        checked = time.monotonic()
        while not received.endswith(b"\n"):
            writers = [self.socket] if to_send else []
            ready, writable, _ = select.select(self.readers, writers, [], POLL_SECONDS)
            now = time.monotonic()
            if self.output in ready:
                self._drain()
            if now > self.deadline:
                raise WorkerLost(
                    "stopped: it waits for something, or the time for the whole lesson is used up"
                )
            if now - checked > POLL_SECONDS:
                checked = now
                self._check_usage()
            with contextlib.suppress(BlockingIOError):
                if writable:
                    to_send = to_send[self.socket.send(to_send) :]
                if self.socket in ready:
                    part = self.socket.recv(1 << 20)
                    if not part:
                        self._died()
                    received += part
            if len(received) > self.limits.answer_mb << 20:
                most = self.limits.answer_mb
                raise WorkerLost(f"the submission answered with more than {most} MB")
        return received

    def _drain(self) -> None:
        """Read what was printed, at most a little at a time; keep the beginning."""
        with contextlib.suppress(BlockingIOError):
            text = os.read(self.output, 1 << 20)
            if not text and self.output in self.readers:
                self.readers.remove(self.output)  # closed at the other end
            self.printed = (self.printed + text)[: self.limits.output_kb << 10]

    def _check_usage(self) -> None:
        limits = self.limits
        memory, computed, tasks, ended = _usage(self.pid, self.host.process.pid)
        if ended:
            self._died()
        if self.computed_before is None:
            self.computed_before = computed
        if computed - self.computed_before > self.allowed:
            raise WorkerLost(
                f"stopped after computing for {self.allowed:g} s: an endless loop, or far too slow"
            )
        if memory > limits.memory_mb:
            raise WorkerLost(f"stopped: it used more than {limits.memory_mb} MB of memory")
        if tasks > limits.processes:
            what = f"{limits.processes} processes or threads"
            raise WorkerLost(f"stopped: it started more than {what}")

    def _died(self) -> NoReturn:
        self.close()
        if self.code is None:
            raise WorkerLost("the submission ended the grader's helper process") from None
        if self.code >= 0:
            why = f"the submission ended the process itself with exit code {self.code} (os._exit?)"
        elif self.code == -signal.SIGKILL:  # ours, after it closed the connection, or the kernel's
            why = "the submission closed its connection or was killed by the system"
        else:
            name = signal.strsignal(-self.code) or f"signal {-self.code}"
            why = f"the process crashed ({name})"
        printed = self.printed.decode("utf-8", "replace").strip()
        raise WorkerLost(
            f"{why}; the last it printed: {printed[-200:]}" if printed else why
        ) from None


def _usage(pid: int, host: int) -> tuple[float, float, int, bool]:
    """What the worker `pid` and all that descends from its host have taken: MB of memory, seconds
    of computing, processes and threads. And whether the worker has ended.
    """
    memory, computed, tasks, ended = 0.0, 0.0, 0, False
    if not LINUX:
        command = ["ps", "-o", "pid=,rss=,stat=,time=", "-g", str(pid)]
        listing = subprocess.run(command, capture_output=True, text=True, check=False)
        for line in listing.stdout.splitlines():
            process, rss, state, clock = line.split()[:4]
            memory += int(rss) / 1024
            minutes, _, seconds = clock.rpartition(":")  # [days-][hours:]minutes:seconds
            computed += 60 * int(minutes.split(":")[-1] or 0) + float(seconds)
            tasks += 1
            ended |= int(process) == pid and state.startswith("Z")
    for process in _descendants(host):
        with contextlib.suppress(OSError):  # gone meanwhile
            status, stat = _status(process), _stat(process)
            ended |= process == pid and stat[0] == "Z"
            tasks += int(status.get("Threads", "1"))
            computed += (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
            for field in ("RssAnon", "RssShmem"):
                memory += int(status.get(field, "0")) / 1024
    return memory, computed, tasks, ended


def _status(process: int | str) -> dict[str, str]:
    """By name the first word of each line: numbers without their unit, which is kB."""
    lines = Path(f"/proc/{process}/status").read_text(errors="replace").splitlines()
    return {line.split(":")[0]: [*line.split(), ""][1] for line in lines}


def _stat(process: int | str) -> list[str]:
    """From the state on: what stands before it, the program's name, may hold anything."""
    with open(f"/proc/{process}/stat", "rb", buffering=0) as file:  # of every process, every time
        return file.read().decode(errors="replace").rpartition(")")[2].split()


def _descendants(ancestor: int) -> list[int]:
    """Process ids of all that `ancestor` started, directly or not. Linux only; elsewhere none."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc") if LINUX else ():
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                children.setdefault(int(_stat(entry)[1]), []).append(int(entry))
    found = [ancestor]
    for process in found:  # which grows meanwhile
        found += children.get(process, [])
    return found[1:]


# ------------------------------------------------------------------------------------- the host


def serve(control: socket.socket, preload: list[str]) -> None:
    """The host: fork a worker or clear one away, as the parent asks, until the parent is gone."""
    # What a worker leaves behind becomes our child, whatever its group.
    _prctl(_SET_CHILD_SUBREAPER, 1)
    gc.disable()  # a sixth of what the imports cost
    sys.modules.update(dict.fromkeys(confinement.FINISHED_MODELS))  # so that nothing imports them
    for statement in preload:
        with contextlib.suppress(Exception):  # the worker that needs it will say so
            exec(statement, {})
    for name in confinement.FINISHED_MODELS:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # the collector of a worker need not touch, and so copy, the pages shared with us
    gc.enable()
    users = cycle(_spare_users())
    reading = confinement.readable(os.getcwd()) if confinement.available() else set()
    try:
        while True:
            message, fds, _, _ = socket.recv_fds(control, 1 << 16, 2)
            if not message:
                break
            request = json.loads(message)
            if "folder" in request:
                user = next(users)  # a new one, so that no two workers share files or messages
                pid = os.fork()
                if pid == 0:
                    control.close()
                    try:
                        limits = Limits(**request["limits"])
                        _become_worker(request["folder"], limits, fds, user, reading)
                    finally:
                        os._exit(70)
                for fd in fds:
                    os.close(fd)
                answer = {"pid": pid, "own_user": user is not None, "confined": bool(reading)}
            else:
                answer = {"code": _reap(request["reap"])}
                if user is not None:
                    _sweep(user.number)
            control.sendall(json.dumps(answer).encode() + b"\n")
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    finally:
        _kill_descendants()
        shutil.rmtree(Path.cwd().parent, ignore_errors=True)  # left if the parent was killed


def _sweep(user: int) -> None:
    """Remove what a user, who has one worker at a time, has left where anybody may write."""
    for place in {tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm", "/run/lock"}:
        with contextlib.suppress(OSError):
            for entry in os.scandir(place):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid != user:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)


def _reap(pid: int) -> int:
    """Exit code of the dead worker. Its orphans are our children now: kill and bury them all."""
    _, status = os.waitpid(pid, 0)
    while True:  # without a child there is nobody to look for
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                _kill_descendants()
                time.sleep(0.005)
        except ChildProcessError:
            return os.waitstatus_to_exitcode(status)


def _kill_descendants() -> None:
    for process in _descendants(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


_USERS = 64  # numbers that one host gives to its workers in turn


@dataclass(frozen=True)
class _User:
    """Whom a worker runs as: a user id that nobody has."""

    number: int
    # With leave to read every file, because Python itself lies where only root may look.
    reads_all: bool


def _spare_users() -> list[_User] | list[None]:
    """[None] where we are not root, or can't become somebody else."""
    if os.geteuid() != 0:
        return [None]
    first = 10_000 + _USERS * (os.getpid() % 800)  # below 65,536, all that some containers have
    # Of this course, of Python and of each large package: workers import from all of them.
    packages = filter(None, map(importlib.util.find_spec, ("torch", "numpy")))
    needed = [__file__, os.__file__, *(package.origin for package in packages)]
    for reads_all in (False, True):
        users = [_User(first + i, reads_all) for i in range(_USERS)]
        pid = os.fork()
        if pid == 0:
            try:
                _become(users[0])
                for path in needed:
                    Path(path).open("rb").close()
                os._exit(0)
            except BaseException:
                os._exit(1)
        if os.waitpid(pid, 0)[1] == 0:
            return users
    return [None]


def _become(user: _User) -> None:
    """Give up root for good.  Raises: OSError."""
    if user.reads_all:
        _prctl(_KEEP_CAPABILITIES, 1)
    os.setgroups([])
    os.setresgid(user.number, user.number, user.number)
    os.setresuid(user.number, user.number, user.number)
    if user.reads_all:
        # capset(2): of all that root may do, keep reading files (CAP_DAC_READ_SEARCH), and no more.
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        effective_permitted_inheritable = (ctypes.c_uint32 * 6)(1 << 2, 1 << 2, 0, 0, 0, 0)
        _libc_call("capset", header, effective_permitted_inheritable)


# ----------------------------------------------------------------------------------- the worker


def _become_worker(
    folder: str, limits: Limits, fds: list[int], user: _User | None, reading: set[Path]
) -> None:
    """In the fork: leave the host's session, lower every limit, then answer questions."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    answers, output = fds
    nothing = os.open(os.devnull, os.O_RDONLY)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (nothing, output, output, answers)]
    for number, fd in enumerate(high):
        os.dup2(fd, number)
    os.closerange(len(high), 4096)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        raw = _Brief(fd, "w", limits.output_kb << 10)
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", write_through=True))
    os.environ.update(HOME=folder, TMPDIR=folder, MPLBACKEND="agg", MPLCONFIGDIR=folder)
    tempfile.tempdir = None
    os.chdir(folder)
    _lower_limits(limits, own_user=user is not None)
    if user is not None:
        os.chown(folder, user.number, user.number)
        for namespace in (_NEW_NETWORK, _NEW_IPC):
            _libc_call("unshare", namespace)  # refused in some containers: no reason to stop
        _become(user)
    _prctl(_NO_NEW_PRIVILEGES, 1)
    _prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if reading:
        confinement.confine(reading, folder)
    from common.grading.probes import answer_questions

    answer_questions(socket.socket(fileno=3))


class _Brief(io.FileIO):
    """A stream that takes everything and passes on the beginning, so that a flood costs little."""

    def __init__(self, fd: int, mode: str, room: int) -> None:
        super().__init__(fd, mode, closefd=False)
        self.room = room

    def write(self, data: bytes) -> int:
        if self.room > 0:
            self.room -= super().write(memoryview(data)[: self.room])
        return len(data)


def _lower_limits(limits: Limits, own_user: bool) -> None:
    lowered = {"CORE": 0, "FSIZE": limits.file_mb << 20, "NOFILE": 256}
    lowered["CPU"] = int(limits.lesson_seconds) + 5
    if LINUX:
        status, names = _status("self"), ("VmSize", "VmData", "RssAnon")
        mapped, data, resident = (int(status[name]) << 10 for name in names)
        memory = limits.memory_mb << 20
        # torch maps gigabytes that it never touches, so this is only a ceiling for absurd requests.
        # What is really used is watched by the parent.
        lowered["AS"] = mapped + 8 * memory
        # One process that asks for more than is left of the limit gets a MemoryError at that line,
        # at once and in every run; the parent, which looks now and then, sees the sum of many.
        lowered["DATA"] = data + max(0, memory - resident - (32 << 20))
    # The limit counts all processes of a user: for a shared one it would be anybody's guess.
    if own_user:
        lowered["NPROC"] = limits.processes
    for name, value in lowered.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


_DIE_WITH_PARENT, _KEEP_CAPABILITIES = 1, 8  # <linux/prctl.h>
_SET_CHILD_SUBREAPER, _NO_NEW_PRIVILEGES = 36, 38
_NEW_NETWORK, _NEW_IPC = 0x40000000, 0x08000000  # <linux/sched.h>


def _prctl(option: int, value: int) -> None:
    _libc_call("prctl", option, value, 0, 0, 0)


def _libc_call(name: str, *arguments: object) -> None:
    """A Linux call that Python has no name for. Where it is refused nothing happens."""
    if LINUX:
        getattr(ctypes.CDLL(None), name)(*arguments)
