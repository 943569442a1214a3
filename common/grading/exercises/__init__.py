"""The exercises: what each asks for, what it is worth, how it is checked.

One manifest per lesson says what is asked, `points.csv` what it is worth. Manifests are INI files,
so that an instructor can change them without programming. One section per exercise:

    [1.3]
    title = The basic block
    level = beginner, intermediate or advanced
    parts = BasicBlock         classes, functions or Class.method: what the starter leaves out
    hint = One sentence for the student.
    try =                      one case a line
        BasicBlock(8, 16, 2) on 2x8x6x6               a module and the shape of its random input
        DenseLayer(36, 12) on [2x24x8x8, 2x12x8x8]    a list of inputs
        ResNet(Bottleneck, (3, 4, 6, 3)) on meta      a large one: built on meta, only counted
        round_channels(32, 1.1)                       no "on": a plain value
    unseen =                   more of the same, for the hidden check
    kind = odd sizes           of what kind the unseen cases are; the student may read it
    setup =                    definitions that the cases use, if any; each line behind a bar,
        |def double(x):        which keeps the indentation
        |    return 2 * x
    mistakes =                 known wrong solutions, so that a message can name the mistake: after
        |# it cuts off         a comment that says what is wrong, the part in its wrong form. A
        |def round_channels(channels, divisor=8):     class without bases: its methods alone.
        |    return int(channels) // divisor * divisor
    aids =                     definitions that the mistakes share; no submission gets to see them

An optional section [lesson] with `source = PATH` names the reference where it isn't the script of
the same name.
"""

from __future__ import annotations

import configparser
import csv
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
LEVELS = ("beginner", "intermediate", "advanced")
VISIBILITIES = ("visible", "hidden", "after_due_date", "after_published")  # Gradescope's words


@dataclass(frozen=True)
class Case:
    """One thing to try, as the manifest has it."""

    text: str
    expression: str
    probe: str  # what the worker does with it: observe a module, count one, or evaluate
    inputs: tuple[tuple[int, ...], ...] = ()
    as_list: bool = False  # forward takes one list of tensors

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lesson, as its manifest describes it."""

    number: str  # "1.3"
    lesson: str  # "01"
    title: str
    level: str
    parts: tuple[str, ...]
    hint: str
    cases: tuple[Case, ...]
    unseen: tuple[Case, ...]
    kind: str = ""
    setup: str = ""
    aids: str = ""
    mistakes: tuple[tuple[str, str], ...] = ()  # what is wrong, the wrong code


@dataclass(frozen=True)
class Worth:
    """One line of points.csv: what passing one check is worth, and who may see the result."""

    exercise: str
    check: str
    points: float
    visibility: str

    @property
    def lesson(self) -> str:
        return lesson_of(self.exercise)


def lesson_of(number: str) -> str:
    """'01' of exercise '1.3'."""
    return f"{int(number.split('.')[0]):02d}"


@lru_cache
def manifests() -> dict[str, Path]:
    """Lesson number -> its manifest."""
    return {path.name[:2]: path for path in sorted(FOLDER.glob("[0-9][0-9]_*.ini"))}


def file_name(lesson: str) -> str:
    """What a submission's file is called: like the manifest, which is called like the lesson."""
    return f"{manifests()[lesson].stem}.py"


@lru_cache
def lesson_path(lesson: str) -> Path:
    """The reference: the lesson's own script, unless the manifest names another file."""
    return ROOT / _parse(lesson).get("lesson", "source", fallback=file_name(lesson))


@lru_cache
def exercises(lesson: str) -> dict[str, Exercise]:
    """The exercises of one lesson by number.

    Raises: ValueError, naming the manifest and what is wrong in it.
    """
    path, parser = manifests()[lesson], _parse(lesson)
    found = {}
    for number in parser.sections():
        if number == "lesson":
            continue
        section = parser[number]
        try:
            if section["level"] not in LEVELS:
                raise ValueError(f"level must be one of {', '.join(LEVELS)}")
            found[number] = Exercise(
                number=number,
                lesson=lesson,
                title=section["title"],
                level=section["level"],
                parts=tuple(section["parts"].split()),
                hint=" ".join(section["hint"].split()),
                cases=_cases(section["try"]),
                unseen=_cases(section.get("unseen", "")),
                kind=" ".join(section.get("kind", "other sizes").split()),
                setup=_dedent(section.get("setup", "")),
                aids=_dedent(section.get("aids", "")),
                mistakes=_mistakes(_dedent(section.get("mistakes", ""))),
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path.name}, section [{number}]: {error}") from None
    return found


@lru_cache
def points() -> tuple[Worth, ...]:
    """The one table of points, in its own order: every total is a sum over it."""
    with (FOLDER / "points.csv").open(newline="", encoding="utf-8") as file:
        table = tuple(
            Worth(row["exercise"], row["check"], float(row["points"]), row["visibility"])
            for row in csv.DictReader(file)
        )
    for row in table:
        if row.visibility not in VISIBILITIES or row.points <= 0:
            raise ValueError(f"points.csv: {row}")
    return table


def worth(lessons: tuple[str, ...]) -> tuple[Worth, ...]:
    """The lines of the table that belong to these lessons."""
    return tuple(row for row in points() if row.lesson in lessons)


def _parse(lesson: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(manifests()[lesson], encoding="utf-8")
    except configparser.Error as error:  # it names the file
        raise ValueError(" ".join(str(error).split())) from None
    return parser


def _cases(text: str) -> tuple[Case, ...]:
    return tuple(_case(line) for line in map(str.strip, text.splitlines()) if line)


_CASE = re.compile(r"(?P<expression>.+) on (?P<input>meta|\[?\d+(x\d+)*(, \d+(x\d+)*)*\]?)")


def _case(line: str) -> Case:
    match = _CASE.fullmatch(line)
    if match is None:
        return Case(line, line, "evaluate")
    expression, shapes = match["expression"], match["input"]
    if shapes == "meta":
        return Case(line, expression, "count")
    inputs = tuple(tuple(map(int, x.split("x"))) for x in shapes.strip("[]").split(", "))
    return Case(line, expression, "observe", inputs, as_list=shapes.startswith("["))


def _dedent(text: str) -> str:
    """A multi-line value without its "|"s, which keep Python's indentation from configparser."""
    return "\n".join(line.removeprefix("|").removeprefix(" ") for line in text.splitlines())


def _mistakes(text: str) -> tuple[tuple[str, str], ...]:
    """Blocks of code, each behind a comment at the margin."""
    blocks = re.split(r"^# ", text, flags=re.MULTILINE)[1:]
    return tuple((block.splitlines()[0].strip(), block.partition("\n")[2]) for block in blocks)
