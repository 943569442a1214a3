"""Mark submissions: one for its author, a whole class for its teacher.

    python -m common.grade 01_resnet_beginner.py                     # a table of points, and what is still wrong
    python -m common.grade my_folder --grade-json results.json       # the same, and Gradescope's file
    python -m common.grade submissions --out grades.csv              # every file and folder in it, in parallel

Scores are made here, in the grader's own process, out of the table `common/exercises/points.csv` and of observations
that workers send (common/sandbox.py). Every line of the table gives exactly one result, whatever the submission
does, so that the total never changes.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import csv
import hashlib
import json
import os
import re
import secrets
import stat
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.exercises import FOLDER, ROOT, Exercise, Worth, exercises, file_name, lesson_path, manifests, worth
from common.exercises.checks import Trial, trials_of, verdict
from common.sandbox import Host, Limits, SandboxUnavailable, Worker, WorkerLost, require_platform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

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

        Raises: ValueError, with a line for the student, if there is no such file or it can't be taken.
        """
        wanted = file_name(lesson)
        if self.path.resolve() == ROOT:  # the lessons themselves
            return wanted, lesson_path(lesson).read_bytes()
        if not self.path.is_dir():
            candidates = [self.path]
        else:
            files = sorted(p for p in self.path.rglob("*.py") if not _is_hidden(p.relative_to(self.path)))
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


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _read(path: Path) -> bytes:
    """The bytes of a plain file. A link may point anywhere and a pipe never ends, so neither is opened."""
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
        self, lessons: Iterable[str], limits: Limits = Limits(), references: References | None = None
    ) -> None:
        self.lessons = tuple(lessons)
        self.references = references or References()
        self.host = Host(preload_modules(self.lessons), limits)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.host.close()

    def mark(self, submission: Submission) -> Iterator[list[Result]]:
        """The results of one exercise after another: one per line of the table."""
        for lesson in self.lessons:
            hopeless = ""  # what keeps the whole file from being run
            try:
                filename, data = submission.source(lesson, only=len(self.lessons) == 1)
            except ValueError as error:
                hopeless = str(error)
            deadline = time.monotonic() + self.host.limits.lesson_seconds
            for exercise in exercises(lesson).values():
                started = time.monotonic()
                if not hopeless and started > deadline:
                    hopeless = f"not marked: the lesson's {self.host.limits.lesson_seconds:g} s are used up"
                if hopeless:
                    yield _all_lost(exercise, hopeless)
                    continue
                theirs = self.references.get(exercise, self.host)
                mine = observe(self.host, exercise, filename, data, self.references.seed, deadline)
                hopeless = mine.hopeless
                yield _judge(exercise, mine.seen, theirs, time.monotonic() - started)

    def mark_exercise(self, submission: Submission, number: str) -> list[Result]:
        """The results of a single exercise."""
        exercise = exercises(f"{int(number.split('.')[0]):02d}")[number]
        try:
            filename, data = submission.source(exercise.lesson, only=len(self.lessons) == 1)
        except ValueError as error:
            return _all_lost(exercise, str(error))
        started = time.monotonic()
        deadline = started + self.host.limits.lesson_seconds
        theirs = self.references.get(exercise, self.host)
        mine = observe(self.host, exercise, filename, data, self.references.seed, deadline)
        return _judge(exercise, mine.seen, theirs, time.monotonic() - started)


class References:
    """What the reference lessons do, observed once for each exercise, with numbers that no student can foresee."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = secrets.randbits(31) if seed is None else seed
        self._seen: dict[str, list[dict]] = {}
        self._lock = threading.Lock()

    def get(self, exercise: Exercise, host: Host) -> list[dict]:
        """Raises: RuntimeError, if the lesson itself fails its exercise: then nobody can be marked."""
        with self._lock:
            if exercise.number not in self._seen:
                path = lesson_path(exercise.lesson)
                seen = observe(host, exercise, path.name, path.read_bytes(), self.seed).seen
                for case, observation in zip(exercise.cases + exercise.unseen, seen):
                    error = observation.get("error") or observation.get("forward_error")
                    if error:
                        raise RuntimeError(f"exercise {exercise.number}, the reference itself: {case}: {error}")
                self._seen[exercise.number] = seen
            return self._seen[exercise.number]


@dataclass(frozen=True)
class Observed:
    """One observation per case of the exercise, the hidden ones last."""

    seen: list[dict[str, Any]]
    hopeless: str = ""  # not empty: the file could not be run at all, and no other exercise need try


def observe(
    host: Host, exercise: Exercise, filename: str, data: bytes, seed: int, deadline: float = float("inf")
) -> Observed:
    """Try all cases of one exercise in a worker of its own. Never raises: whatever goes wrong is an observation."""
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
                "reference": ".".join(lesson_path(exercise.lesson).relative_to(ROOT).with_suffix("").parts),
            }
            answer = worker.ask(question, host.limits.import_seconds, deadline)
            if "error" in answer:
                return Observed([{"error": _clean(answer["error"])}] * len(cases))
            loaded = True
            for i, case in enumerate(cases):
                if case.inputs is None:
                    question = {"probe": "evaluate", "expression": case.expression, "seed": seed + i}
                else:
                    question = {
                        "probe": "observe",
                        "expression": case.expression,
                        "inputs": case.inputs,
                        "as_list": case.as_list,
                        "device": case.device,
                        "seed": seed + i,
                    }
                answer = worker.ask(question, host.limits.case_seconds, deadline)
                seen.append({k: _clean(v) if k.endswith("error") else v for k, v in answer.items()})
            return Observed(seen)
    except WorkerLost as lost:
        message = str(lost) if loaded else f"while it was imported: {lost}"
        seen += [{"error": message}] * (len(cases) - len(seen))
        return Observed(seen, hopeless="" if loaded else message)


def grafts(exercise: Exercise) -> dict[str, Any]:
    """The reference's source without this exercise's parts: other exercises' parts, all else, and its imports."""
    tree = ast.parse(lesson_path(exercise.lesson).read_text(encoding="utf-8"))
    own = {part.split(".")[0] for part in exercise.parts}
    others = {
        part for e in exercises(exercise.lesson).values() if e.number != exercise.number for part in e.parts
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
    names = {"torch": None, "numpy": None, "common.exercises.probes": None}
    for lesson in lessons:
        for node in ast.parse(lesson_path(lesson).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names.update({alias.name: None for alias in node.names})
            elif isinstance(node, ast.ImportFrom) and node.module and node.module != "common":
                names[node.module] = None
            elif isinstance(node, ast.ImportFrom) and node.module == "common":
                names.update({f"common.{alias.name}": None for alias in node.names})
    return tuple(names)


def _judge(exercise: Exercise, mine: list[dict], theirs: list[dict], seconds: float) -> list[Result]:
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
        message=message[:MESSAGE_LIMIT],
        seconds=round(seconds, 3),
    )


def _clean(text: object) -> str:
    """A worker's words, fit to print: no control characters, no escape sequences for a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:MESSAGE_LIMIT]


def not_run(row: Worth) -> Result:
    """The result of a line of the table that nothing was found out about."""
    exercise = exercises(row.lesson)[row.exercise]
    return _result(exercise, row, "not marked: the grader was stopped before, or was told to leave it out")


# ----------------------------------------------------------------------------------------- reports


def table(results: list[Result]) -> str:
    """The results for people: points per exercise, and below each what was lost and why."""
    lines, width = [], 46
    for number, group in by_exercise(results).items():
        got, most = sum(r.score for r in group), sum(r.max_score for r in group)
        level = exercises(f"{int(number.split('.')[0]):02d}")[number].level
        lines.append(f"{number:5} {group[0].title[:width]:{width}} {level:12} {got:5g} / {most:g}")
        lost: dict[str, list[str]] = {}
        for r in group:
            if not r.passed:
                lost.setdefault(r.message, []).append(f"{r.check} -{r.max_score - r.score:g}")
        lines += [f"      {', '.join(checks)}: {message}" for message, checks in lost.items()]
    got, most = sum(r.score for r in results), sum(r.max_score for r in results)
    lines.append(f"{'':5} {'total':{width}} {'':12} {got:5g} / {most:g}")
    return "\n".join(lines)


def by_exercise(results: Iterable[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for r in results:
        groups.setdefault(r.exercise, []).append(r)
    return groups


def gradescope(results: list[Result], seconds: float) -> dict[str, Any]:
    """`results.json` in Gradescope's form. Each test speaks for itself alone: nothing visible tells of a hidden one."""
    return {
        "execution_time": round(seconds, 3),
        "stdout_visibility": "hidden",
        "tests": [
            {
                "name": f"{r.exercise} {r.title}: {r.check}",
                "number": r.exercise,
                "score": r.score,
                "max_score": r.max_score,
                "status": "passed" if r.passed else "failed",
                "output": r.message or "passed",
                "visibility": r.visibility,
            }
            for r in results
        ],
    }


def write_atomically(path: Path, text: str) -> None:
    """All of `text` under that name or what was there before, whenever the power goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_json(path: Path, results: list[Result], seconds: float) -> None:
    write_atomically(path, json.dumps(gradescope(results, seconds), indent=1, allow_nan=False) + "\n")


# ------------------------------------------------------------------------------------- whole class


@dataclass(frozen=True)
class Grade:
    """One line of grades.csv: a student and an exercise."""

    student: str
    lesson: str
    exercise: str
    title: str
    level: str
    score: float
    max_score: float
    failed: str  # checks, separated by blanks
    message: str
    seconds: float
    digest: str  # of the submission, the lessons, the exercises and the table: if it changes, the line is stale


def mark_class(
    folder: Path, out: Path, lessons: tuple[str, ...], jobs: int, limits: Limits, quiet: bool = False
) -> list[Grade]:
    """Mark every file and folder in `folder`; keep what `out` already holds of an unchanged submission.

    `out` is rewritten whenever a student is done, so that a stopped run goes on where it was.
    """
    from tqdm import tqdm

    submissions = [
        Submission(path.stem if path.is_file() else path.name, path)
        for path in sorted(folder.iterdir())
        if not _is_hidden(Path(path.name)) and (path.is_dir() or path.suffix == ".py")
    ]
    rules = _rules_digest(lessons)
    digests = {s.name: f"{s.digest(lessons)}-{rules}" for s in submissions}
    if len(digests) < len(submissions):
        raise ValueError("two submissions have the same name")
    numbers = [number for lesson in lessons for number in exercises(lesson)]
    done: dict[str, list[Grade]] = {}
    for grade in _read_grades(out):
        if digests.get(grade.student) == grade.digest:
            done.setdefault(grade.student, []).append(grade)
    done = {student: grades for student, grades in done.items() if [g.exercise for g in grades] == numbers}
    todo = [s for s in submissions if s.name not in done]

    references, local, graders, lock = References(), threading.local(), [], threading.Lock()

    def mark(submission: Submission) -> list[Grade]:
        if not hasattr(local, "grader"):
            local.grader = Grader(lessons, limits, references)
            with lock:
                graders.append(local.grader)
        return [
            _grade(submission.name, group, digests[submission.name])
            for group in local.grader.mark(submission)
        ]

    bar = tqdm(total=len(submissions), initial=len(done), unit="student", disable=quiet)
    pool = ThreadPoolExecutor(max_workers=jobs)
    try:
        for future in as_completed({pool.submit(mark, s): s for s in todo}):
            grades = future.result()
            done[grades[0].student] = grades
            _write_grades(out, done)
            bar.update()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for grader in graders:
            grader.host.close()
        bar.close()
    _write_grades(out, done)
    return [grade for student in sorted(done) for grade in done[student]]


def _grade(student: str, group: list[Result], digest: str) -> Grade:
    number = group[0].exercise
    lesson = f"{int(number.split('.')[0]):02d}"
    return Grade(
        student=student,
        lesson=lesson,
        exercise=number,
        title=group[0].title,
        level=exercises(lesson)[number].level,
        score=sum(r.score for r in group),
        max_score=sum(r.max_score for r in group),
        failed=" ".join(r.check for r in group if not r.passed),
        message=" | ".join(dict.fromkeys(r.message for r in group if r.message)),
        seconds=round(sum(r.seconds for r in group), 3),
        digest=digest,
    )


def _rules_digest(lessons: tuple[str, ...]) -> str:
    sha = hashlib.sha256()
    paths = [*sorted(FOLDER.glob("*.*")), *(lesson_path(lesson) for lesson in lessons)]
    for path in paths:
        if path.is_file():
            sha.update(path.read_bytes())
    return sha.hexdigest()[:8]


def _read_grades(path: Path) -> list[Grade]:
    """The lines of an earlier run; none where the file is absent or has other columns."""
    names = [field.name for field in fields(Grade)]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != names:
                return []
            rows = [Grade(**{**row, **{k: float(row[k]) for k in _NUMBERS}}) for row in reader]
    except (OSError, ValueError, TypeError):
        return []
    return [replace(row, student=_unquoted(row.student)) for row in rows]


_NUMBERS = ("score", "max_score", "seconds")


def _write_grades(path: Path, done: dict[str, list[Grade]]) -> None:
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Grade)], lineterminator="\n")
    writer.writeheader()
    for student in sorted(done):
        for grade in done[student]:
            row = {k: f"{v:g}" if k in ("score", "max_score") else v for k, v in asdict(grade).items()}
            writer.writerow({k: _quoted(v) if isinstance(v, str) else v for k, v in row.items()})
    write_atomically(path, text.getvalue())


def _quoted(text: str) -> str:
    """A student's text must not become a formula in the teacher's spreadsheet."""
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


def _unquoted(text: str) -> str:
    return text[1:] if text[:1] == "'" and text[1:2] in ("=", "+", "-", "@") else text


# ------------------------------------------------------------------------------------ command line


def parse_lessons(text: str | None) -> tuple[str, ...]:
    """'1,03' -> ('01', '03'); all lessons that have exercises where None.  Raises: ValueError."""
    if not text:
        return tuple(manifests())
    lessons = tuple(name.strip().zfill(2) for name in text.split(","))
    for lesson in lessons:
        if lesson not in manifests():
            raise ValueError(f"lesson {lesson} has no exercises; there are some in {', '.join(manifests())}")
    return lessons


def lessons_for(submission: Submission, chosen: str | None) -> tuple[str, ...]:
    """The lessons to mark: those chosen; else of a lone file its own, of a folder all.  Raises: ValueError."""
    if chosen or submission.path.is_dir():
        return parse_lessons(chosen)
    lesson = submission.lesson()
    if lesson is None:
        raise ValueError(
            f"{submission.path}: can't tell which lesson this is; name it like the lesson "
            f"({file_name(next(iter(manifests())))}) or say --lessons NN"
        )
    return (lesson,)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 marked, with whatever score; 2 bad input; 3 this machine can't isolate a submission."""
    parser = argparse.ArgumentParser(
        prog="python -m common.grade",
        description=__doc__.split("\n\n")[0],
        epilog="\n\n".join(__doc__.split("\n\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    limits = Limits()
    parser.add_argument("submission", type=Path, help="a file, a folder of lessons, or with --out a folder of such")
    parser.add_argument("--out", type=Path, metavar="CSV", help="mark a whole class; goes on where it was stopped")
    parser.add_argument("--lessons", metavar="NN,NN", help="what the assignment consists of (default: all)")
    parser.add_argument("--grade-json", type=Path, metavar="FILE", help="Gradescope's results.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="submissions at a time (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, default=limits.case_seconds, metavar="SECONDS", help="of computing, per import and per case (default: %(default)s)")
    parser.add_argument("--memory-limit", type=int, default=limits.memory_mb, metavar="MB", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    limits = replace(
        limits,
        import_seconds=options.time_limit,
        case_seconds=options.time_limit,
        memory_mb=options.memory_limit,
    )
    try:
        require_platform()
        if not options.submission.exists():
            raise ValueError(f"no such file or folder: {options.submission}")
        if options.jobs < 1 or options.time_limit <= 0 or options.memory_limit < 100:
            raise ValueError("--jobs must be at least 1, --time-limit positive, --memory-limit at least 100")
        if options.out:
            if not options.submission.is_dir():
                raise ValueError(f"--out marks a class, so {options.submission} must be a folder of submissions")
            grades = mark_class(
                options.submission, options.out, parse_lessons(options.lessons), options.jobs, limits
            )
            students = len({grade.student for grade in grades})
            print(f"{options.out}: {students} students, {len(grades)} lines")
        else:
            _mark_one(options.submission, options.lessons, options.grade_json, limits)
    except ValueError as error:
        print(f"grade: {error}", file=sys.stderr)
        return 2
    except SandboxUnavailable as error:
        print(f"grade: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\ngrade: interrupted; what was marked is kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


def _mark_one(path: Path, chosen: str | None, json_path: Path | None, limits: Limits) -> None:
    submission = Submission(path.stem, path)
    lessons = lessons_for(submission, chosen)
    rows = worth(lessons)
    results: dict[tuple[str, str], Result] = {}
    started = time.monotonic()

    def save() -> list[Result]:
        """All lines of the table, those without a result at zero; so the file is valid if we are killed too."""
        everything = [results.get((row.exercise, row.check)) or not_run(row) for row in rows]
        if json_path:
            write_json(json_path, everything, time.monotonic() - started)
        return everything

    save()
    with Grader(lessons, limits) as grader:
        for group in grader.mark(submission):
            results.update({(r.exercise, r.check): r for r in group})
            save()
    print(table(save()))


if __name__ == "__main__":
    sys.exit(main())
