"""Marking: a submission's source goes into workers, their observations become points.

Scores are made here, in the grader's own process, out of the table `points.csv` and of observations
that workers send (`sandbox`). Every line of the table gives exactly one result, whatever the
submission does, so that the total never changes.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import re
import secrets
import stat
import threading
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from common.grading.checks import Trial, trials_of, verdict
from common.grading.exercises import (
    ROOT,
    Exercise,
    Worth,
    exercises,
    file_name,
    lesson_of,
    lesson_path,
    manifests,
    worth,
)
from common.grading.sandbox import Host, Limits, Worker, WorkerLost

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

SOURCE_LIMIT = 1 << 20  # bytes of a submitted file
MESSAGE_LIMIT = 1000  # characters of one result's message


@dataclass(frozen=True)
class Result:
    """What one line of the table of points gave."""

    exercise: str
    check: str
    title: str
    score: float
    max_score: float
    visibility: str
    message: str  # "" where the check passed
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.score == self.max_score


# ------------------------------------------------------------------------------------- submissions


@dataclass(frozen=True)
class Submission:
    """A student's file, or a folder of files named like the lessons."""

    name: str
    path: Path

    def source(self, lesson: str, only: bool = False) -> tuple[str, bytes]:
        """File name and content of what was submitted for `lesson`.

        Args:
            only: no other lesson is marked, so that a file of any name can be meant.

        Raises: ValueError, with a line for the student, if there is no such file or it can't be
            taken.
        """
        wanted = file_name(lesson)
        if self.path.is_symlink():
            raise ValueError(f"{self.path.name} is a link; links are not followed")
        if self.path.resolve() == ROOT:  # the lessons themselves
            return wanted, lesson_path(lesson).read_bytes()
        if not self.path.is_dir():
            candidates = [self.path]
        else:
            files = sorted(
                p for p in self.path.rglob("*.py") if not is_hidden(p.relative_to(self.path))
            )
            candidates = [p for p in files if p.name == wanted]
            candidates = candidates or [p for p in files if re.match(rf"{lesson}\D", p.name)]
            if not candidates and only and len(files) == 1:
                candidates = files
            if not candidates:
                names = ", ".join(p.name for p in files[:5])
                there = f"there is {names}" if names else "there is no .py file at all"
                raise ValueError(f"missing file: no {wanted}; {there}")
        if len(candidates) > 1:
            places = ", ".join(str(p.relative_to(self.path)) for p in candidates[:3])
            raise ValueError(f"more than one file for lesson {lesson}: {places}; leave one")
        return candidates[0].name, _read(candidates[0])

    def lesson(self) -> str | None:
        """The lesson that a lone file belongs to, by its name or else by what it defines."""
        match = re.match(r"\d\d(?=\D)", self.path.name)
        if match and match.group() in manifests():
            return match.group()
        try:
            text = _read(self.path).decode("utf-8", "replace")
        except ValueError:
            return None
        defined = set(re.findall(r"^(?:class|def)\s+(\w+)", text, re.MULTILINE))
        wanted = {
            lesson: {part.split(".")[0] for e in exercises(lesson).values() for part in e.parts}
            for lesson in manifests()
        }
        best = max(wanted, key=lambda lesson: len(defined & wanted[lesson]))
        return best if defined & wanted[best] else None

    def digest(self, lessons: tuple[str, ...]) -> str:
        """Changes when the files that would be marked change."""
        sha = hashlib.sha256()
        for lesson in lessons:
            try:
                name, data = self.source(lesson, only=len(lessons) == 1)
            except ValueError as error:
                name, data = "", str(error).encode()
            sha.update(f"{lesson} {name} {len(data)} ".encode() + data)
        return sha.hexdigest()[:16]


def is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _read(path: Path) -> bytes:
    """The bytes of a plain file. A link may point anywhere and a pipe never ends, so neither is
    opened.
    """
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is not a plain file (links are not followed)")
        if status.st_size > SOURCE_LIMIT:
            raise ValueError(f"{path.name} is larger than {SOURCE_LIMIT >> 20} MB")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} can't be read: {error.strerror}") from None


# ----------------------------------------------------------------------------------------- marking


class Grader:
    """Marks submissions one after another. Use as a context manager: it keeps a host process warm.

    Args:
        lessons: what will be marked.
        limits: for each worker.
        references: shared by the graders of a class, so that the reference is observed once.
    """

    def __init__(
        self,
        lessons: Iterable[str],
        limits: Limits | None = None,
        references: References | None = None,
    ) -> None:
        self.lessons = tuple(lessons)
        self.references = references or References()
        self.host = Host(preload_modules(self.lessons), limits or Limits())
        self.files: dict[tuple[str, bytes], _File] = {}

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.host.close()

    def mark(self, submission: Submission) -> Iterator[list[Result]]:
        """The results of one exercise after another: one per line of the table."""
        for lesson in self.lessons:
            for number in exercises(lesson):
                yield self.mark_exercise(submission, number)

    def mark_exercise(self, submission: Submission, number: str) -> list[Result]:
        """The results of one exercise. A file that can't be run is not tried again for the next."""
        exercise = exercises(lesson_of(number))[number]
        try:
            filename, data = submission.source(exercise.lesson, only=len(self.lessons) == 1)
        except ValueError as error:
            return _all_lost(exercise, str(error))
        key = exercise.lesson, hashlib.sha256(data).digest()
        file = self.files.setdefault(key, _File(self.host.limits.lesson_seconds))
        if not file.hopeless and file.seconds_left <= 0:
            file.hopeless = "not marked: the time for the whole lesson is used up"
        if file.hopeless:
            return _all_lost(exercise, file.hopeless)
        theirs = self.references.get(exercise, self.host)
        started = time.monotonic()
        deadline = started + file.seconds_left
        mine = observe(self.host, exercise, filename, data, self.references.seed, deadline)
        file.hopeless = mine.hopeless
        file.seconds_left -= time.monotonic() - started
        return _judge(exercise, mine.seen, theirs, time.monotonic() - started)


@dataclass
class _File:
    """What is known of one submitted file from the exercises marked before."""

    seconds_left: float
    hopeless: str = ""  # why it can't be run at all


class References:
    """What the reference lessons do, observed once for each exercise, with numbers that no student
    can foresee.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = secrets.randbits(31) if seed is None else seed
        self._seen: dict[str, list[dict]] = {}
        self._lock = threading.Lock()

    def get(self, exercise: Exercise, host: Host) -> list[dict]:
        """Raises: RuntimeError, if the lesson itself fails: then nobody can be marked."""
        with self._lock:
            if exercise.number not in self._seen:
                path = lesson_path(exercise.lesson)
                seen = observe(host, exercise, path.name, path.read_bytes(), self.seed).seen
                for case, observation in zip(exercise.cases + exercise.unseen, seen):
                    error = observation.get("error") or observation.get("forward_error")
                    if error:
                        raise RuntimeError(
                            f"exercise {exercise.number}, the reference itself: {case}: {error}"
                        )
                self._seen[exercise.number] = seen
            return self._seen[exercise.number]


@dataclass(frozen=True)
class Observed:
    """One observation per case of the exercise, the hidden ones last."""

    seen: list[dict[str, Any]]
    hopeless: str = (
        ""  # not empty: the file could not be run at all, and no other exercise need try
    )


def observe(
    host: Host,
    exercise: Exercise,
    filename: str,
    data: bytes,
    seed: int,
    deadline: float = float("inf"),
) -> Observed:
    """Try all cases of one exercise in a worker of its own. Never raises: whatever goes wrong is an
    observation.
    """
    cases = exercise.cases + exercise.unseen
    seen: list[dict[str, Any]] = []
    loaded = False
    try:
        with Worker(host) as worker:
            question = {
                "probe": "load",
                "filename": filename,
                "source": base64.b64encode(data).decode(),
                "parts": exercise.parts,
                "grafts": grafts(exercise),
                "setup": exercise.setup,
                "reference": ".".join(
                    lesson_path(exercise.lesson).relative_to(ROOT).with_suffix("").parts
                ),
            }
            answer = worker.ask(question, host.limits.import_seconds, deadline)
            if "error" in answer:
                return Observed([{"error": _clean(answer["error"])}] * len(cases))
            loaded = True
            for i, case in enumerate(cases):
                question = {"probe": case.probe, "expression": case.expression}
                if case.probe != "count":
                    question["seed"] = seed + i
                if case.probe == "observe":
                    question |= {"inputs": case.inputs, "as_list": case.as_list}
                answer = worker.ask(question, host.limits.case_seconds, deadline)
                seen.append({k: _clean(v) if k.endswith("error") else v for k, v in answer.items()})
                if str(answer.get("error", "")).startswith("not done yet"):
                    return Observed([seen[-1]] * len(cases))
            return Observed(seen)
    except WorkerLost as lost:
        message = str(lost) if loaded else f"while it was imported: {lost}"
        if lost.kind == "death" and worker.text().strip():
            message += f"; the last it printed: {_clean(worker.text().strip())[-200:]}"
        seen += [{"error": message}] * (len(cases) - len(seen))
        return Observed(seen, hopeless="" if loaded else message)


@cache
def grafts(exercise: Exercise) -> dict[str, Any]:
    """The reference's source without this exercise's parts: other exercises' parts, all else, and
    its imports.
    """
    tree = ast.parse(lesson_path(exercise.lesson).read_text(encoding="utf-8"))
    own = {part.split(".")[0] for part in exercise.parts}
    others = {
        part
        for e in exercises(exercise.lesson).values()
        if e.number != exercise.number
        for part in e.parts
    }
    imports, replaced, lacking = [], {}, {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(ast.unparse(node))
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name not in own:
            (replaced if node.name in others else {})[node.name] = ast.unparse(node)
            lacking[node.name] = ast.unparse(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            lacking.update({t.id: ast.unparse(node) for t in targets if isinstance(t, ast.Name)})
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and f"{node.name}.{method.name}" in others:
                    replaced[f"{node.name}.{method.name}"] = ast.unparse(method)
    return {"imports": "\n".join(imports), "replace": replaced, "lacking": lacking}


def preload_modules(lessons: Iterable[str]) -> tuple[str, ...]:
    """What these lessons import, for the host to import once. Not the lessons themselves."""
    # The first step of any optimizer imports torch._dynamo, which takes more than a second.
    names = dict.fromkeys(["torch", "torch._dynamo", "numpy", "common.grading.probes"])
    for lesson in lessons:
        for node in ast.parse(lesson_path(lesson).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names.update({alias.name: None for alias in node.names})
            elif isinstance(node, ast.ImportFrom) and node.module and node.module != "common":
                names[node.module] = None
            elif isinstance(node, ast.ImportFrom) and node.module == "common":
                names.update({f"common.{alias.name}": None for alias in node.names})
    return tuple(names)


def _judge(
    exercise: Exercise, mine: list[dict], theirs: list[dict], seconds: float
) -> list[Result]:
    cases = exercise.cases + exercise.unseen
    trials = [Trial(case, m, t) for case, m, t in zip(cases, mine, theirs)]
    visible, hidden = trials[: len(exercise.cases)], trials[len(exercise.cases) :]
    rows = _rows(exercise)
    messages = [verdict(row.check, trials_of(row.check, visible, hidden)) for row in rows]
    return [
        _result(exercise, row, message, seconds / len(rows)) for row, message in zip(rows, messages)
    ]


def _all_lost(exercise: Exercise, message: str) -> list[Result]:
    return [_result(exercise, row, message) for row in _rows(exercise)]


def _rows(exercise: Exercise) -> list[Worth]:
    return [row for row in worth((exercise.lesson,)) if row.exercise == exercise.number]


def _result(exercise: Exercise, row: Worth, message: str, seconds: float = 0.0) -> Result:
    return Result(
        exercise=row.exercise,
        check=row.check,
        title=exercise.title,
        score=0.0 if message else row.points,
        max_score=row.points,
        visibility=row.visibility,
        message=_clean(message),
        seconds=round(seconds, 3),
    )


def _clean(text: object) -> str:
    """Words of a submission, fit to print: no escape sequences, nothing that UTF-8 can't hold."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:MESSAGE_LIMIT]


def not_run(row: Worth, why: str = "the grader was stopped before, or told to skip it") -> Result:
    """The result of a line of the table that nothing was found out about."""
    exercise = exercises(row.lesson)[row.exercise]
    return _result(exercise, row, f"not marked: {why}")
