"""Mark submissions: one for its author, a whole class for its teacher.

    python -m common.grade 01_resnet_beginner.py                  # points, and what is still wrong
    python -m common.grade my_folder --grade-json results.json    # the same, and Gradescope's file
    python -m common.grade submissions --out grades.csv           # all of it, and class.html

How it is done is in common/grading/marking.py; here are the reports and the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.engine.flags import OneLineParser
from common.grading import confinement, variants
from common.grading.class_page import class_page
from common.grading.exercises import (
    FOLDER,
    exercises,
    file_name,
    lesson_of,
    lesson_path,
    manifests,
    worth,
)
from common.grading.marking import (
    MARKED,
    PACKED,
    Grader,
    References,
    Result,
    Submission,
    is_hidden,
    not_run,
)
from common.grading.platforms import PLATFORMS, by_exercise
from common.grading.sandbox import Limits, require_platform

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# ----------------------------------------------------------------------------------------- reports


def table(results: list[Result]) -> str:
    """The results for people: points per exercise, and below each what was lost and why."""
    lines, width = [], 46
    for number, group in by_exercise(results).items():
        got, most = sum(r.score for r in group), sum(r.max_score for r in group)
        level = exercises(lesson_of(number))[number].level
        lines.append(f"{number:5} {group[0].title[:width]:{width}} {level:12} {got:5g} / {most:g}")
        lost: dict[str, list[str]] = {}
        for r in group:
            if not r.passed:
                lost.setdefault(r.message, []).append(f"{r.check} -{r.max_score - r.score:g}")
        lines += [f"      {', '.join(checks)}: {message}" for message, checks in lost.items()]
    got, most = sum(r.score for r in results), sum(r.max_score for r in results)
    lines.append(f"{'':5} {'total':{width}} {'':12} {got:5g} / {most:g}")
    return "\n".join(lines)


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


def write_json(
    path: Path, results: list[Result], seconds: float, platform: str = "gradescope"
) -> None:
    told = PLATFORMS[platform](results, seconds)
    write_atomically(path, json.dumps(told, indent=1, allow_nan=False) + "\n")


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
    digest: str  # of the submission, the lesson, the checks and the table: the line is about these


def mark_class(
    submissions: list[Submission],
    out: Path,
    lessons: tuple[str, ...],
    jobs: int,
    limits: Limits,
    quiet: bool = False,
    roster: Iterable[str] = (),
) -> list[Grade]:
    """Mark them all; keep what `out` already holds of an unchanged submission.

    `out` is rewritten whenever a student is done, so that a stopped run goes on where it was.

    Args:
        roster: who should have handed in: who has not gets lines with 0 points.
    """
    from tqdm import tqdm

    rules = _rules_digest(lessons)
    digests = {s.name: f"{s.digest(lessons)}-{rules}" for s in submissions}
    rows = worth(lessons)
    numbers = [number for lesson in lessons for number in exercises(lesson)]
    done: dict[str, list[Grade]] = {}
    for grade in _read_grades(out):
        if digests.get(grade.student) == grade.digest:
            done.setdefault(grade.student, []).append(grade)
    done = {
        student: grades
        for student, grades in done.items()
        if [g.exercise for g in grades] == numbers
    }
    todo = [s for s in submissions if s.name not in done]

    references, local, graders, lock = References(), threading.local(), [], threading.Lock()

    def mark(submission: Submission) -> list[Grade]:
        if not hasattr(local, "grader"):
            local.grader = Grader(lessons, limits, references)
            with lock:
                graders.append(local.grader)
        digest = digests[submission.name]
        try:
            return [
                _grade(submission.name, group, digest) for group in local.grader.mark(submission)
            ]
        except RuntimeError:
            raise  # nobody can be marked
        except Exception as error:  # whatever it is, the others get their marks
            lost = by_exercise(not_run(row, f"the grader failed: {error!r}") for row in rows)
            return [_grade(submission.name, group, digest="again") for group in lost.values()]

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
    return _conclude(out, done, submissions, lessons, roster)


def _conclude(
    out: Path,
    done: dict[str, list[Grade]],
    submissions: list[Submission],
    lessons: tuple[str, ...],
    roster: Iterable[str],
) -> list[Grade]:
    """Who is missing gets lines with 0; grades.csv is written."""
    rows, handed_in = worth(lessons), {_name(s.path) for s in submissions}
    for name in roster:
        if name not in handed_in:
            lost = by_exercise(not_run(row, "not handed in") for row in rows)
            done[name] = [_grade(name, group, digest="none") for group in lost.values()]
    _write_grades(out, done)
    return [grade for student in sorted(done) for grade in done[student]]


def mark_variants(
    folder: Path,
    submissions: list[Submission],
    out: Path,
    lessons: tuple[str, ...],
    options: Sequence[str],
    roster: Iterable[str],
    seeds: Mapping[str, int],
) -> list[Grade]:
    """As `mark_class`, where submissions are of several variants: each variant is marked by a
    course of its own, which is made for it.

    Args:
        folder: where the submissions are.
        options: flags for the graders.
        seeds: variant by name of the submission.
    """
    kept: dict[str, list[Grade]] = {}
    for grade in _read_grades(out):
        kept.setdefault(grade.student, []).append(grade)
    done: dict[str, list[Grade]] = {}
    for seed in sorted(set(seeds.values())):
        names = [s.name for s in submissions if seeds[s.name] == seed]
        with tempfile.TemporaryDirectory(prefix="class-") as there:
            students, table = Path(there, "students.json"), Path(there, "grades.csv")
            students.write_text(json.dumps(names), encoding="utf-8")
            _write_grades(table, {name: kept[name] for name in names if name in kept})
            command = [folder.resolve(), "--out", table, "--students", students, *options]
            try:
                code = in_variant(seed, map(str, command), stdout=subprocess.DEVNULL)
            finally:
                for grade in _read_grades(table):
                    done.setdefault(grade.student, []).append(grade)
                _write_grades(out, {**kept, **done})
        if code:
            raise KeyboardInterrupt if code == 130 else RuntimeError(f"variant {seed}: exit {code}")
    return _conclude(out, done, submissions, lessons, roster)


def in_variant(seed: int, arguments: Iterable[str], stdout: int | None = None) -> int:
    """This command in a course with the variant in it; its exit code."""
    with tempfile.TemporaryDirectory(prefix="course-") as course:
        variants.make_course(variants.drawn(seed), Path(course))
        command = [sys.executable, "-m", "common.grade", *arguments, "--variant", "0"]
        return subprocess.run(command, cwd=course, stdout=stdout).returncode


def variant_of(submission: Submission, lessons: tuple[str, ...]) -> int:
    """What the head of the submitted files names.  Raises: ValueError, where they differ."""
    seeds = set()
    for lesson in lessons:
        with contextlib.suppress(ValueError):
            source = submission.source(lesson, only=len(lessons) == 1)[1]
            seeds.add(variants.seed_of(source.decode("utf-8", "replace")))
    if len(seeds) > 1:
        raise ValueError(f"{submission.name}: its files are of several variants: {sorted(seeds)}")
    return seeds.pop() if seeds else 0


def variants_of(
    submissions: list[Submission], lessons: tuple[str, ...], roster: Mapping[str, int | None]
) -> dict[str, int]:
    """By name: what the roster says, else the file. A submission that contradicts itself is marked
    as the course is, and a line says so: nobody's file may stop the others' marks.
    """
    seeds = {}
    for s in submissions:
        seed = roster.get(_name(s.path))
        try:
            seeds[s.name] = variant_of(s, lessons) if seed is None else seed
        except ValueError as error:
            print(f"note: {error}; marked as variant 0", file=sys.stderr)
            seeds[s.name] = 0
    return seeds


def find_submissions(folder: Path, out: Path, tell: bool = True) -> list[Submission]:
    """Every file and folder that somebody may have handed in, but for `out` itself. What can't be
    marked gets its lines too, and says why.

    Args:
        tell: notes of namesakes and of what is no submission.
    """
    paths = [
        path
        for path in sorted(folder.iterdir())
        if not is_hidden(Path(path.name))
        and (path.is_dir() or path.suffix.lower() in (*MARKED, *PACKED))
    ]
    names = Counter(_name(path) for path in paths)
    found = []
    for path in paths:
        name = _name(path)
        if names[name] > 1:  # ann.py beside ann/: both are marked, under their whole names
            whole = _text(path.name) + ("/" if path.is_dir() else "")
            if tell:
                print(f"note: more than one submission is called {name}: {whole}", file=sys.stderr)
            name = whole
        found.append(Submission(name, path))
    ignored = [
        path.name
        for path in sorted(folder.iterdir())
        if path not in paths and path != out and not is_hidden(Path(path.name))
    ]
    if ignored and tell:
        print(f"note: not a submission: {', '.join(map(_text, ignored[:9]))}", file=sys.stderr)
    return found


def read_roster(path: Path) -> dict[str, int | None]:
    """The names in the first column of a CSV file, or in its column `student` or `name`, and for
    each what its column `variant` says; None where it has none.  Raises: ValueError.
    """
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--roster {path}: can't be read: {error}") from None
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((head.index(word) for word in ("student", "name") if word in head), None)
    variant = head.index("variant") if "variant" in head else None
    seeds: dict[str, int | None] = {}
    for row in rows[(column, variant) != (None, None) :]:
        name, seed = (row[i].strip() if i < len(row) else "" for i in (column or 0, variant or 0))
        if name and variant is not None and not re.fullmatch(r"\d{1,9}", seed, re.ASCII):
            raise ValueError(f"--roster {path}: the variant of {name} is {seed!r}, no number")
        if name:
            seeds.setdefault(name, None if variant is None else int(seed))
    if not seeds:
        raise ValueError(f"--roster {path}: has no names in its first column")
    return seeds


def _name(path: Path) -> str:
    """What a student is called in the table."""
    return _text(path.name if path.is_dir() else path.stem)


def _text(name: str) -> str:
    """A file's name as text: of one that is none, its bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _grade(student: str, group: list[Result], digest: str) -> Grade:
    number = group[0].exercise
    lesson = lesson_of(number)
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
            row = {
                k: f"{v:g}" if k in ("score", "max_score") else v for k, v in asdict(grade).items()
            }
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
            raise ValueError(
                f"lesson {lesson} has no exercises; there are some in {', '.join(manifests())}"
            )
    return lessons


def lessons_for(submission: Submission, chosen: str | None) -> tuple[str, ...]:
    """The lessons to mark: those chosen; else of a lone file its own, of a folder all.  Raises:
    ValueError.
    """
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
    """Exit codes: 0 marked, with whatever score; 2 bad input; 3 the grader itself can't work here;
    130 Ctrl-C.
    """
    parser = OneLineParser(
        prog="python -m common.grade",
        description=__doc__.split("\n\n")[0],
        epilog="\n\n".join(__doc__.split("\n\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    limits = Limits()
    parser.add_argument(
        "submission", type=Path, help="a file, a folder of lessons, or with --out a folder of such"
    )
    parser.add_argument(
        "--out", type=Path, metavar="CSV", help="mark a whole class; goes on where it was stopped"
    )
    parser.add_argument(
        "--roster", type=Path, metavar="CSV", help="with --out: who is missing gets 0 points"
    )
    parser.add_argument(
        "--lessons", metavar="NN,NN", help="what the assignment consists of (default: all)"
    )
    parser.add_argument("--students", type=Path, help=argparse.SUPPRESS)  # of `mark_variants`
    parser.add_argument(
        "--variant",
        type=int,
        metavar="SEED",
        help="of the starter (default: what the file or the roster's column `variant` says)",
    )
    parser.add_argument(
        "--grade-json", type=Path, metavar="FILE", help="the marks for a platform, as it reads them"
    )
    parser.add_argument(
        "--platform", choices=PLATFORMS, default="gradescope", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="submissions at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=limits.case_seconds,
        metavar="SECONDS",
        help="of computing, per import and per case (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-limit",
        type=int,
        default=limits.memory_mb,
        metavar="MB",
        help="(default: %(default)s)",
    )
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
        if options.variant is not None and not 0 <= options.variant < 2**31:
            raise ValueError(f"--variant {options.variant}: a number from 0 to {2**31 - 1}")
        in_bounds = 1 <= options.jobs <= 1000 and 100 <= options.memory_limit <= 10**7
        if not in_bounds or not 0 < options.time_limit <= 86400:
            raise ValueError(
                "--jobs is 1 to 1000, --time-limit up to 86400 (a day), --memory-limit 100 to 10^7"
            )
        if options.out:
            if not options.submission.is_dir():
                raise ValueError(
                    f"--out marks a class, so {options.submission} must be a folder of submissions"
                )
            roster = read_roster(options.roster) if options.roster else {}
            lessons = parse_lessons(options.lessons)
            found = find_submissions(options.submission, options.out, tell=not options.students)
            if options.students:
                named = set(json.loads(options.students.read_text(encoding="utf-8")))
                found = [s for s in found if s.name in named]
            if options.variant is None:
                seeds = variants_of(found, lessons, roster)
            else:
                seeds = dict.fromkeys((s.name for s in found), options.variant)
            if any(seeds.values()):
                flags = _flags(options)
                where = options.submission, found, options.out, lessons
                grades = mark_variants(*where, flags, roster, seeds)
            else:
                where = found, options.out, lessons
                grades = mark_class(*where, options.jobs, limits, roster=roster)
            if grades and not options.students:
                page = options.out.with_name("class.html")
                write_atomically(page, class_page(grades, found))
            names = {grade.student.rstrip("/") for grade in grades}
            strangers = sorted(
                n for n in names if roster and n not in roster and Path(n).stem not in roster
            )
            if strangers:
                print(f"note: not on the roster: {', '.join(strangers[:9])}", file=sys.stderr)
            students = len({grade.student for grade in grades})
            if os.geteuid() != 0 and not confinement.available():
                print(
                    "note: submissions ran as your own user; see docs/GRADING.md about strangers",
                    file=sys.stderr,
                )
            print(f"{options.out}: {students} students, {len(grades)} lines")
            if grades and not options.students:
                print(f"{page}: the class on one page")
        else:
            submission = Submission(options.submission.stem, options.submission)
            lessons = lessons_for(submission, options.lessons)
            seed = options.variant
            if seed is None:
                seed = variant_of(submission, lessons)
            if seed:
                return _mark_variant(seed, options)
            kept = options.grade_json, options.platform
            _mark_one(submission, lessons, *kept, limits)
    except ValueError as error:
        print(f"grade: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # SandboxUnavailable, or a lesson that fails its own exercise
        print(f"grade: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print(
            "\ngrade: interrupted; what was marked is kept, the same command goes on",
            file=sys.stderr,
        )
        return 130
    return 0


def _flags(options: argparse.Namespace) -> list[str]:
    """What a grader of a variant is told as this one was."""
    limits = [f"--time-limit={options.time_limit}", f"--memory-limit={options.memory_limit}"]
    lessons = [f"--lessons={options.lessons}"] if options.lessons else []
    return [f"--jobs={options.jobs}", *limits, *lessons]


def _mark_variant(seed: int, options: argparse.Namespace) -> int:
    """One submission of a variant; the paths are the caller's, not the variant's course's."""
    print(f"variant {seed}", flush=True)
    command = [str(options.submission.resolve()), f"--platform={options.platform}"]
    command += _flags(options)
    command += [f"--grade-json={options.grade_json.resolve()}"] if options.grade_json else []
    return in_variant(seed, command)


def _mark_one(
    submission: Submission,
    lessons: tuple[str, ...],
    json_path: Path | None,
    platform: str,
    limits: Limits,
) -> None:
    rows = worth(lessons)
    results: dict[tuple[str, str], Result] = {}
    started = time.monotonic()

    def save() -> list[Result]:
        """All lines of the table, those without a result at zero; so the file is valid if we are
        killed too.
        """
        everything = [results.get((row.exercise, row.check)) or not_run(row) for row in rows]
        if json_path:
            write_json(json_path, everything, time.monotonic() - started, platform)
        return everything

    save()
    with Grader(lessons, limits) as grader:
        for group in grader.mark(submission):
            results.update({(r.exercise, r.check): r for r in group})
            save()
    print(table(save()))


if __name__ == "__main__":
    sys.exit(main())
