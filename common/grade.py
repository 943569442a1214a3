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
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from common.cli import OneLineParser
from common.engine.errors import UserError
from common.engine.files import write_atomically
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
from common.grading.platforms import PLATFORMS, grouped, points_of
from common.grading.sandbox import Limits, require_platform

# ----------------------------------------------------------------------------------------- reports


def table(results: list[Result]) -> str:
    """The results for people: points per exercise, and below each what was lost and why."""
    lines, width = [], 46
    for number, group in grouped(results, "exercise").items():
        got, most = points_of(group)
        level = exercises(lesson_of(number))[number].level
        lines.append(f"{number:5} {group[0].title[:width]:{width}} {level:12} {got:5g} / {most:g}")
        for message, lost in grouped((r for r in group if not r.passed), "message").items():
            checks = ", ".join(f"{r.check} -{r.max_score - r.score:g}" for r in lost)
            lines.append(f"      {checks}: {message}")
    got, most = points_of(results)
    lines.append(f"{'':5} {'total':{width}} {'':12} {got:5g} / {most:g}")
    return "\n".join(lines)


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
    """Mark them all; who is on the roster and did not hand in gets lines with 0 points.

    `out` is rewritten whenever a student is done, so that a stopped run goes on where it was; what
    it holds of an unchanged submission stays.
    """
    from tqdm import tqdm

    rules = _rules_digest(lessons)
    digests = {s.name: f"{s.digest(lessons)}-{rules}" for s in submissions}
    numbers = [number for lesson in lessons for number in exercises(lesson)]
    done = {
        student: grades
        for student, grades in grouped(_read_grades(out), "student").items()
        if [(g.exercise, g.digest) for g in grades] == [(n, digests.get(student)) for n in numbers]
    }
    todo = [s for s in submissions if s.name not in done]
    references, local, graders = References(), threading.local(), []

    def begin_thread() -> None:
        local.grader = Grader(lessons, limits, references)
        graders.append(local.grader)

    def mark(submission: Submission) -> list[Grade]:
        name = submission.name
        try:
            return [_grade(name, group, digests[name]) for group in local.grader.mark(submission)]
        except RuntimeError:
            raise  # nobody can be marked
        except Exception as error:  # whatever it is, the others get their marks
            return _lost(name, lessons, f"the grader failed: {error!r}", digest="again")

    pool = ThreadPoolExecutor(jobs, initializer=begin_thread)
    with tqdm(total=len(submissions), initial=len(done), unit="student", disable=quiet) as bar:
        try:
            for future in as_completed([pool.submit(mark, s) for s in todo]):
                grades = future.result()
                done[grades[0].student] = grades
                _write_grades(out, done)
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
            for grader in graders:
                grader.host.close()
    return _conclude(out, done, submissions, lessons, roster)


def _conclude(
    out: Path,
    done: dict[str, list[Grade]],
    submissions: list[Submission],
    lessons: tuple[str, ...],
    roster: Iterable[str],
) -> list[Grade]:
    """Who is missing gets lines with 0; grades.csv is written."""
    handed_in = {_name(s.path) for s in submissions}
    for name in roster:
        if name not in handed_in:
            done[name] = _lost(name, lessons, "not handed in", digest="none")
    _write_grades(out, done)
    return [grade for student in sorted(done) for grade in done[student]]


def mark_variants(
    folder: Path, submissions: list[Submission], out: Path, flags: list[str], seeds: dict[str, int]
) -> dict[str, list[Grade]]:
    """As `mark_class`, where the submissions in `folder` are of several variants (`seeds`, by name
    of the submission): each variant is marked, with these flags, by a course that is made for it.
    """
    kept = grouped(_read_grades(out), "student")
    done: dict[str, list[Grade]] = {}
    for seed in sorted(set(seeds.values())):
        names = [s.name for s in submissions if seeds[s.name] == seed]
        with tempfile.TemporaryDirectory(prefix="class-") as there:
            students, table = Path(there, "students.json"), Path(there, "grades.csv")
            students.write_text(json.dumps(names), encoding="utf-8")
            _write_grades(table, {name: kept[name] for name in names if name in kept})
            command = [folder.resolve(), "--out", table, "--students", students, *flags]
            try:
                code = in_variant(seed, map(str, command), stdout=subprocess.DEVNULL)
            finally:
                done |= grouped(_read_grades(table), "student")
                _write_grades(out, {**kept, **done})
        if code:
            raise KeyboardInterrupt if code == 130 else RuntimeError(f"variant {seed}: exit {code}")
    return done


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
    """By name: what the roster says, else the file. A submission that contradicts itself is of
    variant 0, and a line says so: nobody's file may stop the others' marks.
    """
    seeds = {}
    for s in submissions:
        seed = roster.get(_name(s.path))
        try:
            seeds[s.name] = variant_of(s, lessons) if seed is None else seed
        except ValueError as error:
            _note(f"{error}; marked as variant 0")
            seeds[s.name] = 0
    return seeds


def find_submissions(folder: Path, out: Path, tell: bool = True) -> list[Submission]:
    """Every file and folder that somebody may have handed in, also what can't be marked, but for
    `out`. `tell`: notes of namesakes and of what is no submission.
    """
    entries = [path for path in sorted(folder.iterdir()) if not is_hidden(Path(path.name))]
    paths = [p for p in entries if p.is_dir() or p.suffix.lower() in (*MARKED, *PACKED)]
    names = Counter(_name(path) for path in paths)
    found = []
    for path in paths:
        name = _name(path)
        if names[name] > 1:  # ann.py beside ann/: both are marked, under their whole names
            whole = _text(path.name) + ("/" if path.is_dir() else "")
            if tell:
                _note(f"more than one submission is called {name}: {whole}")
            name = whole
        found.append(Submission(name, path))
    ignored = [path.name for path in entries if path not in paths and path != out]
    if ignored and tell:
        _note(f"not a submission: {', '.join(map(_text, ignored[:9]))}")
    return found


def read_roster(path: Path) -> dict[str, int | None]:
    """The names in the first column of a CSV file, or in its column `student` or `name`, and for
    each what its column `variant` says; None where it has none.  Raises: ValueError.
    """
    try:
        lines = unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig")).splitlines()
        first = next(filter(str.strip, lines), "")
        comma = max(",;\t", key=first.count)  # as the spreadsheet's language has it
        rows = list(csv.reader(lines, delimiter=comma))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--roster {path}: can't be read: {error}") from None
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((head.index(word) for word in ("student", "name") if word in head), None)
    variant = head.index("variant") if "variant" in head else None
    seeds: dict[str, int | None] = {}
    for row in rows[(column, variant) != (None, None) :]:
        name, seed = (row[i].strip() if i < len(row) else "" for i in (column or 0, variant or 0))
        if name and variant is not None and not re.fullmatch(r"\d{1,10}", seed, re.ASCII):
            raise ValueError(f"--roster {path}: the variant of {name} is {seed!r}, no number")
        if name:
            seeds.setdefault(name, None if variant is None else int(seed))
    if not seeds:
        raise ValueError(f"--roster {path}: has no names in its first column")
    return seeds


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _name(path: Path) -> str:
    """What a student is called in the table."""
    return _text(path.name if path.is_dir() else path.stem)


def _text(name: str) -> str:
    """A file's name as text: of one that is none, its bytes."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)  # macOS writes an umlaut as two characters


def _grade(student: str, group: list[Result], digest: str) -> Grade:
    number = group[0].exercise
    lesson = lesson_of(number)
    got, most = points_of(group)
    return Grade(
        student=student,
        lesson=lesson,
        exercise=number,
        title=group[0].title,
        level=exercises(lesson)[number].level,
        score=got,
        max_score=most,
        failed=" ".join(r.check for r in group if not r.passed),
        message=" | ".join(dict.fromkeys(r.message for r in group if r.message)),
        seconds=round(sum(r.seconds for r in group), 3),
        digest=digest,
    )


def _lost(student: str, lessons: tuple[str, ...], why: str, digest: str) -> list[Grade]:
    """No points for anything."""
    groups = grouped((not_run(row, why) for row in worth(lessons)), "exercise")
    return [_grade(student, group, digest) for group in groups.values()]


def _rules_digest(lessons: tuple[str, ...]) -> str:
    sha = hashlib.sha256()
    paths = [*sorted(FOLDER.parent.glob("*.py")), *sorted(FOLDER.glob("*.*"))]
    for path in [*paths, *(lesson_path(lesson) for lesson in lessons)]:
        if path.is_file():
            sha.update(path.read_bytes())
    return sha.hexdigest()[:8]


def _read_grades(path: Path) -> list[Grade]:
    """The lines of an earlier run; none where the file is absent or has other columns."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            numbers = ("score", "max_score", "seconds")
            rows = [
                Grade(**{**row, **{k: float(row[k]) for k in numbers}})
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, TypeError):
        return []
    return [replace(row, student=re.sub(r"^'(?=[=+@-])", "", row.student)) for row in rows]


def _write_grades(path: Path, done: dict[str, list[Grade]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Grade)], lineterminator="\n")
    writer.writeheader()
    for student in sorted(done):
        for grade in done[student]:
            row = {k: _quoted(v) if isinstance(v, str) else v for k, v in asdict(grade).items()}
            row |= {"score": f"{grade.score:g}", "max_score": f"{grade.max_score:g}"}
            writer.writerow(row)
    write_atomically(path, text.getvalue())


def _quoted(text: str) -> str:
    """A student's text must not become a formula in the teacher's spreadsheet."""
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


# ------------------------------------------------------------------------------------ command line


def parse_lessons(text: str | None) -> tuple[str, ...]:
    """'1,03' -> ('01', '03'); all lessons that have exercises where None.  Raises: ValueError."""
    if not text:
        return tuple(manifests())
    names = [name.strip() for name in text.split(",")]
    lessons = tuple(dict.fromkeys(name and name.zfill(2) for name in names))
    for lesson in lessons:
        if lesson not in manifests():
            known = ", ".join(manifests())
            raise ValueError(
                f"lesson {lesson or repr(lesson)} has no exercises; there are some in {known}"
            )
    return lessons


def lessons_for(submission: Submission, chosen: str | None) -> tuple[str, ...]:
    """Those chosen; else of a lone file its own, of a folder all.  Raises: ValueError."""
    if chosen or submission.path.is_dir():
        return parse_lessons(chosen)
    lesson = submission.lesson()
    if lesson is None:
        raise ValueError(
            f"{submission.path}: can't tell which lesson this is; name it like the lesson "
            f"({file_name(next(iter(manifests())))}) or say --lessons NN"
        )
    return (lesson,)


def _parser() -> OneLineParser:
    description, epilog = __doc__.split("\n\n", 1)
    parser = OneLineParser(
        prog="python -m common.grade",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, limits = parser.add_argument, Limits()
    # fmt: off
    add("submission", type=Path, help="a file, a folder of lessons, or with --out a folder of such")
    add("--out", type=Path, metavar="CSV", help="mark a whole class; goes on where it was stopped")
    add("--roster", type=Path, metavar="CSV", help="with --out: who is missing gets 0 points")
    add("--lessons", metavar="NN,NN", help="what the assignment consists of (default: all)")
    add("--students", type=Path, help=argparse.SUPPRESS)  # of `mark_variants`
    add("--variant", type=int, metavar="SEED",
        help="of the starter (default: what the file or the roster's column `variant` says)")
    add("--grade-json", type=Path, metavar="FILE",
        help="the marks for a platform, as it reads them")
    add("--platform", choices=PLATFORMS, default="gradescope", help="(default: %(default)s)")
    add("--jobs", type=int, default=os.cpu_count() or 1,
        help="submissions at a time (default: %(default)s)")
    add("--time-limit", type=float, default=limits.case_seconds, metavar="SECONDS",
        help="of computing, per import and per case (default: %(default)s)")
    add("--memory-limit", type=int, default=limits.memory_mb, metavar="MB",
        help="(default: %(default)s)")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 marked, with whatever score; 2 bad input; 3 the grader itself can't work here;
    130 Ctrl-C.
    """
    options = _parser().parse_args(argv)
    seconds, memory = options.time_limit, options.memory_limit
    limits = Limits(import_seconds=seconds, case_seconds=seconds, memory_mb=memory)
    try:
        require_platform()
        if not options.submission.exists():
            raise ValueError(f"no such file or folder: {options.submission}")
        if options.variant is not None and not 0 <= options.variant < 2**31:
            raise ValueError(f"--variant {options.variant}: a number from 0 to {2**31 - 1}")
        in_bounds = 1 <= options.jobs <= 1000 and 100 <= memory <= 10**7
        if not in_bounds or not 0 < seconds <= 86400:
            raise ValueError(
                "--jobs is 1 to 1000, --time-limit up to 86400 (a day), --memory-limit 100 to 10^7"
            )
        return _mark_all(options, limits) if options.out else _mark_one(options, limits)
    except (UserError, ValueError, RuntimeError, OSError) as error:
        print(f"grade: {error}", file=sys.stderr)
        # A RuntimeError: SandboxUnavailable, or a lesson that fails its own exercise.
        return 3 if isinstance(error, RuntimeError) else 2
    except KeyboardInterrupt:
        told = "\ngrade: interrupted; what was marked is kept, the same command goes on"
        print(told, file=sys.stderr)
        return 130


def _mark_all(options: argparse.Namespace, limits: Limits) -> int:
    """A class; where `options.students` names some of it, this is the run for their variant."""
    folder, out = options.submission, options.out
    if not folder.is_dir():
        raise ValueError(f"--out marks a class, so {folder} must be a folder of submissions")
    roster = read_roster(options.roster) if options.roster else {}
    lessons = parse_lessons(options.lessons)
    found = find_submissions(folder, out, tell=not options.students)
    if options.students:
        named = set(json.loads(options.students.read_text(encoding="utf-8")))
        found = [s for s in found if s.name in named]
    if options.variant is None:
        seeds = variants_of(found, lessons, roster)
    else:
        seeds = dict.fromkeys((s.name for s in found), options.variant)
    if any(seeds.values()):
        done = mark_variants(folder, found, out, _flags(options), seeds)
        grades = _conclude(out, done, found, lessons, roster)
    else:
        grades = mark_class(found, out, lessons, options.jobs, limits, roster=roster)
    page = out.with_name("class.html") if grades and not options.students else None
    if page:
        write_atomically(page, class_page(grades, found))
    students = {grade.student for grade in grades}
    names = {student.rstrip("/") for student in students} if roster else set()
    strangers = sorted(n for n in names if n not in roster and Path(n).stem not in roster)
    if strangers:
        _note(f"not on the roster: {', '.join(strangers[:9])}")
    if os.geteuid() != 0 and not confinement.available():
        _note("submissions ran as your own user; see docs/GRADING.md about strangers")
    print(f"{out}: {len(students)} students, {len(grades)} lines")
    if page:
        print(f"{page}: the class on one page")
    return 0


def _flags(options: argparse.Namespace) -> list[str]:
    """What a grader of a variant is told as this one was."""
    named = "jobs", "time_limit", "memory_limit", "lessons"
    given = {name: value for name in named if (value := getattr(options, name))}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def _mark_one(options: argparse.Namespace, limits: Limits) -> int:
    submission = Submission(options.submission.stem, options.submission)
    lessons = lessons_for(submission, options.lessons)
    seed = variant_of(submission, lessons) if options.variant is None else options.variant
    target = options.grade_json
    if seed:  # paths are the caller's, not the variant's course's
        print(f"variant {seed}", flush=True)
        command = [str(options.submission.resolve()), f"--platform={options.platform}"]
        command += [f"--grade-json={target.resolve()}"] if target else []
        return in_variant(seed, command + _flags(options))
    rows = worth(lessons)
    results: dict[tuple[str, str], Result] = {}
    started = time.monotonic()

    def save() -> list[Result]:
        """A line without a result is at zero, so that the file is valid if we are killed too."""
        everything = [results.get((row.exercise, row.check)) or not_run(row) for row in rows]
        if target:
            write_json(target, everything, time.monotonic() - started, options.platform)
        return everything

    save()
    with Grader(lessons, limits) as grader:
        for group in grader.mark(submission):
            results.update({(r.exercise, r.check): r for r in group})
            save()
    print(table(save()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
