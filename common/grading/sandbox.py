"""Somebody else's code in a process of its own: questioned, limited and killed from outside.

Three processes take part. The **parent** (the grader) asks questions and keeps the scores; it never
runs a student's code and never unpickles what it is sent. The **host** is a small helper that
imports torch once and forks, because importing torch takes seconds and forking takes milliseconds.
Each **worker** is such a fork: a session and process group of its own, with limits, an empty
folder, no way to reach the host's connection and, where the grader runs as root, an unprivileged
user of its own and no network. It answers questions until the parent kills it, with everything it
has started.

What this stops: endless loops, crashes, exits, floods of output, memory, processes and threads,
writing over the grader's files. What it does not stop: code that reads what its user may read, and
code that uses a hole in the kernel. Without root the worker is the same user as the grader and
could kill it. For people whom you do not know, run the whole grader in a container
(docs/GRADING.md).

It needs fork, sessions and resource limits: Linux or macOS. On Linux the host imports torch before
it forks; on macOS, where a fork after Apple's frameworks have started is unsafe, each worker
imports it for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
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
from dataclasses import asdict, dataclass, replace
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
    """The worker can't answer any more. `kind` is for programs, the message for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


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
    """The parent's end of one host process, which runs one worker at a time. Use as a context
    manager.

    Args:
        preload: modules that the host imports before it forks, so that no worker pays for them.
        limits: what each worker may take.
    """

    def __init__(self, preload: tuple[str, ...] = (), limits: Limits = Limits()) -> None:
        require_platform()
        self.limits = limits
        self.preload = preload if LINUX else ()
        # Whether workers run as a user of their own, and whether they may open only what they need:
        # known after the first.
        self.own_user: bool | None = None
        self.confined: bool | None = None
        self.home: Path | None = None  # holds the workers' course and the folder of each worker
        self.process: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the host process, unless it runs."""
        if self.process is not None and self.process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        self.home = Path(tempfile.mkdtemp(prefix="grader-"))
        environment = {k: v for k, v in os.environ.items() if k in _KEPT_VARIABLES}
        environment.update(PYTHONDONTWRITEBYTECODE="1", **_ONE_THREAD)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, str(theirs.fileno()), *self.preload],
            cwd=self.home,
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()
        self.control = ours
        self.home.chmod(0o755)
        copy_course(self.home / "course")
        ours.sendall(b"!")

    def fork(self) -> tuple[int, socket.socket, int, Path]:
        """A new worker: its process id, the socket to question it, the pipe with its output, its
        folder.

        Raises: SandboxUnavailable, if it can't be had twice in a row: that is never a submission's
            fault.
        """
        for _ in range(2):
            self.start()
            folder = Path(tempfile.mkdtemp(prefix="submission-", dir=self.home))
            questions, theirs = socket.socketpair()
            output, their_output = os.pipe()
            if LINUX:
                with contextlib.suppress(OSError):  # a large one, so that a flood runs off fast
                    fcntl.fcntl(output, 1031, 1 << 20)  # F_SETPIPE_SZ
            try:
                request = json.dumps({"folder": str(folder), "limits": asdict(self.limits)})
                fds = [theirs.fileno(), their_output]
                socket.send_fds(self.control, [request.encode() + b"\n"], fds)
                answer = _read_line(self.control)
            except OSError:
                answer = b""
            finally:
                theirs.close()
                os.close(their_output)
            if answer:
                worker = json.loads(answer)
                self.own_user, self.confined = worker["own_user"], worker["confined"]
                return worker["pid"], questions, output, folder
            questions.close()
            os.close(output)
            shutil.rmtree(folder, ignore_errors=True)
            self.close()
        raise SandboxUnavailable(
            "the grader's helper process can't start a worker; its own error is above"
        )

    def reap(self, pid: int) -> int | None:
        """Wait for a killed worker and clear away whatever it left running. Its exit status, None
        if unknown.
        """
        try:
            self.control.sendall(json.dumps({"reap": pid}).encode() + b"\n")
            return json.loads(_read_line(self.control))["status"]
        except (OSError, ValueError):
            self.close()  # the host is gone too: the next worker gets a new one
            return None

    def close(self) -> None:
        if self.control is not None:
            self.control.close()
            self.control = None
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        if self.home is not None:
            shutil.rmtree(self.home, ignore_errors=True)
            self.home = None


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
    """What workers need of the course, without its solutions.

    `common/` and the lessons, with every exercise's body taken out; of the grader only what runs in
    a worker. No compiled file of a source that was changed, and no git objects.
    """
    from common.grading.exercises import exercises, lesson_path, manifests
    from common.grading.holes import take_out

    of_grader = {"__init__.py", "confinement.py", "loading.py", "mutants.py", "probes.py"}
    of_grader |= {"sandbox.py", "weights.py"}
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
    """One worker and the questions to it. Use as a context manager; leaving it kills the worker.

    Raises (all methods): WorkerLost, once and for all, when the worker died, lied about the
    protocol or went over a limit.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.limits = host.limits
        self.pid, self.socket, self.output, self.folder = host.fork()
        self.socket.setblocking(False)
        os.set_blocking(self.output, False)
        self.readers = [self.socket, self.output]
        self.printed = b""
        self.lost: WorkerLost | None = None
        self.closed = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def ask(
        self, question: dict[str, Any], seconds: float, deadline: float = float("inf")
    ) -> dict[str, Any]:
        """The worker's answer, plain JSON data: to be judged, never to be trusted.

        Args:
            seconds: of computing that the answer may take.
            deadline: by `time.monotonic()`, when the answer must be there at the latest.
        """
        if self.lost is not None:
            raise self.lost
        # An answer must repeat this number: a submission can't lay out answers before it is asked.
        number = secrets.token_hex(8)
        self.allowed, self.computed_before = seconds, None
        self.deadline = min(deadline, time.monotonic() + seconds * self.limits.patience)
        try:
            self._send(json.dumps({**question, "number": number}).encode() + b"\n")
            answer = json.loads(self._receive())
            if not isinstance(answer, dict) or answer.pop("number", None) != number:
                raise ValueError
            return answer
        except (ValueError, RecursionError):
            self._lose("protocol", "the submission interfered with the grader's connection")
        except OSError:
            self._died()

    def close(self) -> None:
        """Kill the worker and everything it has started, and remove its folder."""
        if self.closed:
            return
        self.closed = True
        _kill_group(self.pid)
        self.status = self.host.reap(self.pid)
        with contextlib.suppress(OSError):
            self._drain()
        self.socket.close()
        os.close(self.output)
        shutil.rmtree(self.folder, ignore_errors=True)

    def text(self) -> str:
        """The beginning of what the submission printed."""
        return self.printed.decode("utf-8", "replace")

    def _send(self, message: bytes) -> None:
        while message:
            self._wait(writing=True)
            with contextlib.suppress(BlockingIOError):
                message = message[self.socket.send(message) :]

    def _receive(self) -> bytes:
        received = bytearray()
        while not received.endswith(b"\n"):
            self._wait()
            try:
                part = self.socket.recv(1 << 20)
            except BlockingIOError:
                continue
            if not part:
                self._died()
            received += part
            if len(received) > self.limits.answer_mb << 20:
                self._lose(
                    "protocol", f"the submission answered with more than {self.limits.answer_mb} MB"
                )
        return bytes(received)

    def _wait(self, writing: bool = False) -> None:
        """Until the socket is ready. Reads the output meanwhile, and enforces every limit."""
        checked = time.monotonic()
        while True:
            writers = [self.socket] if writing else []
            ready, writable, _ = select.select(self.readers, writers, [], POLL_SECONDS)
            now = time.monotonic()
            if self.output in ready:
                self._drain()
            if now > self.deadline:
                self._lose(
                    "time",
                    "stopped: it waits for something, or the time for the whole lesson is used up",
                )
            if now - checked > POLL_SECONDS:
                checked = now
                self._check_usage()
            if self.socket in ready or writable:
                return

    def _drain(self) -> None:
        """Read what was printed, at most a little at a time; keep the beginning."""
        with contextlib.suppress(BlockingIOError):
            text = os.read(self.output, 1 << 20)
            if not text and self.output in self.readers:
                self.readers.remove(self.output)  # closed at the other end
            room = (self.limits.output_kb << 10) - len(self.printed)
            self.printed += text[: max(0, room)]

    def _check_usage(self) -> None:
        usage = _usage(self.pid, self.host.process.pid)
        if usage.ended:
            self._died()
        if self.computed_before is None:
            self.computed_before = usage.seconds
        if usage.seconds - self.computed_before > self.allowed:
            self._lose(
                "time",
                f"stopped after computing for {self.allowed:g} s: an endless loop, or far too slow",
            )
        if usage.memory_mb > self.limits.memory_mb:
            self._lose("memory", f"stopped: it used more than {self.limits.memory_mb} MB of memory")
        if usage.tasks > self.limits.processes:
            self._lose(
                "processes",
                f"stopped: it started more than {self.limits.processes} processes or threads",
            )

    def _died(self) -> NoReturn:
        self.close()
        if self.status is None:
            self._lose("grader", "the submission ended the grader's helper process")
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            name = signal.Signals(number).name
            if number == signal.SIGKILL:  # ours, after it closed the connection, or the kernel's
                self._lose(
                    "death", "the submission closed its connection or was killed by the system"
                )
            self._lose("death", f"the process crashed ({name})")
        code = os.WEXITSTATUS(self.status)
        self._lose(
            "death", f"the submission ended the process itself with exit code {code} (os._exit?)"
        )

    def _lose(self, kind: str, message: str) -> NoReturn:
        self.lost = WorkerLost(kind, message)
        self.close()
        raise self.lost from None


_KEPT_VARIABLES = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "TMPDIR",
    "VIRTUAL_ENV",
)
_ONE_THREAD = {
    f"{library}_NUM_THREADS": "1"
    for library in ("OMP", "MKL", "OPENBLAS", "VECLIB_MAXIMUM", "NUMEXPR")
}


@dataclass
class _Usage:
    memory_mb: float = 0.0
    seconds: float = 0.0  # of computing
    tasks: int = 0  # processes and threads
    ended: bool = False


def _usage(pid: int, host: int) -> _Usage:
    """What the worker `pid` and all that descends from its host have taken."""
    usage = _Usage()
    if not LINUX:
        command = ["ps", "-o", "pid=,rss=,stat=,time=", "-g", str(pid)]
        listing = subprocess.run(command, capture_output=True, text=True, check=False)
        for line in listing.stdout.splitlines():
            process, rss, state, clock = line.split()[:4]
            usage.memory_mb += int(rss) / 1024
            minutes, _, seconds = clock.rpartition(":")  # [days-][hours:]minutes:seconds
            usage.seconds += 60 * int(minutes.split(":")[-1] or 0) + float(seconds)
            usage.tasks += 1
            usage.ended |= int(process) == pid and state.startswith("Z")
        return usage
    for process in _descendants(host):
        try:
            status = Path(f"/proc/{process}/status").read_text()
            stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        usage.ended |= process == pid and stat[0] == "Z"
        usage.tasks += int(fields.get("Threads", "1"))
        usage.seconds += (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        for field in ("RssAnon", "RssShmem"):
            usage.memory_mb += int(fields.get(field, "0 kB").split()[0]) / 1024
    return usage


def _descendants(ancestor: int) -> list[int]:
    """Process ids of all that `ancestor` started, directly or not. Linux only; elsewhere none."""
    if not LINUX:
        return []
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                parent = int(stat.rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found, queue = [], [ancestor]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)  # before it had become the leader of its own group


def _read_line(connection: socket.socket) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        part = connection.recv(1)
        if not part:
            return b""
        line += part
    return bytes(line)


# ------------------------------------------------------------------------------------- the host


def serve(control: socket.socket, preload: list[str]) -> None:
    """The host: fork a worker or clear one away, as the parent asks, until the parent is gone."""
    _prctl(
        _SET_CHILD_SUBREAPER, 1
    )  # what a worker leaves behind becomes our child, whatever its group
    sys.modules.update(dict.fromkeys(confinement.FINISHED_MODELS))  # so that nothing imports them
    for name in preload:
        with contextlib.suppress(Exception):  # the worker that needs it will say so
            __import__(name)
    for name in confinement.FINISHED_MODELS:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # the collector of a worker need not touch, and so copy, the pages shared with us
    user, count = _spare_user(), 0
    reading = confinement.readable([os.getcwd()]) if confinement.available() else []
    try:
        while True:
            message, fds, _, _ = socket.recv_fds(control, 1 << 16, 2)
            if not message:
                break
            request = json.loads(message)
            if "folder" in request:
                count += 1  # a new user each, so that no two workers share files or messages
                of_worker = user and replace(user, number=user.number + count % _USERS)
                pid = os.fork()
                if pid == 0:
                    control.close()
                    try:
                        limits = Limits(**request["limits"])
                        _become_worker(request["folder"], limits, fds, of_worker, reading)
                    finally:
                        os._exit(70)
                for fd in fds:
                    os.close(fd)
                answer = {
                    "pid": pid, "own_user": user is not None, "confined": bool(reading)
                }  # fmt: skip
            else:
                answer = {"status": _reap(request["reap"])}
                if user is not None:
                    _sweep(user.number + count % _USERS)
            control.sendall(json.dumps(answer).encode() + b"\n")
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    finally:
        for process in _descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        # Left behind if the parent was killed.
        shutil.rmtree(Path.cwd().parent, ignore_errors=True)


def _sweep(user: int) -> None:
    """Remove what a worker's user has left where anybody may write.

    Nothing, where the kernel keeps it from writing there. Each user has one worker at a time.
    """
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
    """Status of the dead worker. Its orphans are our children now: kill and bury them all."""
    _, status = os.waitpid(pid, 0)
    while True:
        for process in _descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.005)
        except ChildProcessError:
            return status


_USERS = 64  # numbers that one host gives to its workers in turn


@dataclass(frozen=True)
class _User:
    """Whom a worker runs as: a user id that nobody has."""

    number: int
    reads_all: (
        bool  # with leave to read every file, because Python itself lies where only root may look
    )


def _spare_user() -> _User | None:
    """None where we are not root, or can't become somebody else."""
    if os.geteuid() != 0:
        return None
    for reads_all in (False, True) if LINUX else (False,):
        # Below 65,536, which is all that some containers have.
        user = _User(10_000 + _USERS * (os.getpid() % 800), reads_all)
        pid = os.fork()
        if pid == 0:
            try:
                _become(user)
                for path in _needed_files():
                    with open(path, "rb"):
                        pass
                os._exit(0)
            except BaseException:
                os._exit(1)
        if os.waitpid(pid, 0)[1] == 0:
            return user
    return None


def _needed_files() -> list[str]:
    """A file of this course, one of Python's own and one of each large package: workers import from
    all of them.
    """
    files = (getattr(sys.modules.get(name), "__file__", None) for name in ("torch", "numpy"))
    return [__file__, os.__file__, *(file for file in files if file)]


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
    folder: str, limits: Limits, fds: list[int], user: _User | None, reading: list[Path]
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
            # Refused in some containers, which is no reason to stop.
            _libc_call("unshare", namespace)
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
    def lower(name: str, value: int) -> None:
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))

    lower("RLIMIT_CORE", 0)
    lower("RLIMIT_FSIZE", limits.file_mb << 20)
    lower("RLIMIT_NOFILE", 256)
    lower("RLIMIT_CPU", int(limits.lesson_seconds) + 5)
    if LINUX:
        # torch maps gigabytes that it never touches, so this is only a ceiling for absurd requests.
        # What is really used is watched by the parent.
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        lower("RLIMIT_AS", mapped + 8 * (limits.memory_mb << 20))
        # One process that asks for more than is left of the limit gets a MemoryError at that line,
        # at once and in every run; the parent, which looks now and then, sees the sum of many.
        status = Path("/proc/self/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        data, resident = (int(fields[name].split()[0]) << 10 for name in ("VmData", "RssAnon"))
        lower("RLIMIT_DATA", data + max(0, (limits.memory_mb << 20) - resident - (32 << 20)))
    # The limit counts all processes of a user: for a shared one it would be anybody's guess.
    if own_user:
        lower("RLIMIT_NPROC", limits.processes)


_DIE_WITH_PARENT, _KEEP_CAPABILITIES = 1, 8  # <linux/prctl.h>
_SET_CHILD_SUBREAPER, _NO_NEW_PRIVILEGES = 36, 38
_NEW_NETWORK, _NEW_IPC = 0x40000000, 0x08000000  # <linux/sched.h>


def _prctl(option: int, value: int) -> None:
    _libc_call("prctl", option, value, 0, 0, 0)


def _libc_call(name: str, *arguments: object) -> None:
    """A Linux call that Python has no name for. Where it is refused nothing happens."""
    if LINUX:
        getattr(ctypes.CDLL(None), name)(*arguments)
