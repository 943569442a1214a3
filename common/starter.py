"""Make the starter of an assignment out of its lesson: `python -m common.starter 01 --out DIR`.

The lesson stays as it is, marker-free. The manifest says which classes and functions are the
exercises; their bodies go, their signatures and docstrings stay. What is made anew from the lesson
can't drift away from it.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path

from common.cli import OneLineParser
from common.engine.errors import UserError
from common.engine.files import write_atomically
from common.grading import variants
from common.grading.exercises import ROOT, exercises, file_name, lesson_path, manifests, points
from common.grading.holes import take_out

# Behind the lesson's docstring: what to do, and a cell that finds the course. The course stands
# before the starter's own folder, so that a lesson that builds on another finds the lesson and not
# its starter.
ASSIGNMENT = """
{head}# %% [markdown]
# ## Your exercises
#
# Every `raise NotImplementedError` below marks a piece that is yours to write. The
# docstrings say what goes in and what comes out. Keep names and signatures: the rest of
# the script and the checks rely on them.
#
{tasks}
#
# Run it: it goes as far as the first piece that is missing. Check yourself, as often as
# you like, from the course's folder:
#
#     python {name}
#     python -m common.grade path/to/{name}
#
# If it does not find `common`, say where the course is: PYTHONPATH=path/to/course

# %%
# This file may lie anywhere: here it looks for the course's folder, the one with `common` in it.
import sys
from pathlib import Path

here = Path(globals().get("__file__", "x")).resolve().parent
for folder in (here / {course!r}, here, *here.parents, Path.cwd()):
    if (folder / "common" / "grading").is_dir():
        sys.path.insert(0, str(folder))
        break
"""


def make_starter(
    lesson: str, only: Collection[str] | None = None, folder: Path = ROOT, variant: int = 0
) -> str:
    """The text of the starter of `lesson`, with the exercises `only` (numbers; all where None)
    taken out.

    Args:
        folder: where it will lie, from where it finds the course.
        variant: a seed, see common/grading/variants.py; 0: the lesson as it is.
    """
    chosen = [
        variants.with_hint(exercise, variant)
        for number, exercise in exercises(lesson).items()
        if only is None or number in only
    ]
    path, edited = lesson_path(lesson), variants.texts(variants.drawn(variant))
    source = edited.get(path.relative_to(ROOT)) or path.read_text(encoding="utf-8")
    tasks = []
    for e in chosen:
        parts = ", ".join(f"`{part}`" for part in e.parts)
        worth_it = f"({e.level}, {_points([e.number]):g} points)"
        tasks.append(f"# - **{e.number} {e.title}** {worth_it}: {parts}.")
        tasks.append(_wrapped(f"Hidden cases: {e.kind}.", "#   "))
    try:
        course = os.path.relpath(ROOT, folder.resolve())
    except ValueError:  # on another drive of Windows
        course = str(ROOT)
    text = ASSIGNMENT.format(
        head=_wrapped(variants.head(variant, lesson)[2:], "# ") + "\n\n" if variant else "",
        tasks="\n".join(tasks),
        name=file_name(lesson),
        course=course,
    )
    source = take_out(source, chosen)
    docstring, *others = ast.parse(source).body
    start = docstring.end_lineno
    for node in others:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            start = node.end_lineno  # it must come first
    lines = source.splitlines(keepends=True)
    return "".join([*lines[:start], text, *lines[start:]])


def _points(numbers: Collection[str]) -> float:
    return sum(row.points for row in points() if row.exercise in numbers)


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, 99, initial_indent=indent, subsequent_indent=indent)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0; 2 for a lesson that has no exercises, a folder that can't be written, a file
    in the way.
    """
    parser = OneLineParser(prog="python -m common.starter", description=__doc__.split("\n\n")[0])
    parser.add_argument("lesson", nargs="+", help="number of a lesson, 00 to 08, or all")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write the starters to"
    )
    parser.add_argument("--only", nargs="+", metavar="N.M", help="take out these exercises only")
    parser.add_argument(
        "--variant", type=int, default=0, metavar="SEED",
        help="change what some exercises ask for; common.grade finds the seed in the file",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite a file that is there")
    options = parser.parse_args(argv)
    chosen = [number.zfill(2)[:2] for number in options.lesson]
    try:
        if not 0 <= options.variant < 2**31:
            raise ValueError(f"--variant {options.variant}: a number from 0 to {2**31 - 1}")
        for lesson in manifests() if options.lesson == ["all"] else chosen:
            _write(lesson, options)
    except (UserError, ValueError, OSError) as error:
        print(f"starter: {error}", file=sys.stderr)
        return 2
    return 0


def _write(lesson: str, options: argparse.Namespace) -> None:
    if lesson not in manifests():
        known = ", ".join(manifests())
        raise ValueError(f"lesson {lesson} has no exercises; there are some in {known}")
    known = exercises(lesson)
    for number in options.only or ():
        if number.split(".")[0].zfill(2) == lesson and number not in known:
            raise ValueError(f"no exercise {number} in lesson {lesson}; it has {', '.join(known)}")
    numbers = [n for n in known if n in (options.only or known)]
    if not numbers:
        raise ValueError(f"--only {' '.join(options.only)}: none of it is of lesson {lesson}")
    path = options.out / file_name(lesson)
    if path.resolve() == lesson_path(lesson).resolve():
        raise ValueError(f"{path} is the lesson itself: choose another folder")
    if path.exists() and not options.force:
        raise ValueError(f"{path} exists, and may hold somebody's work: remove it or add --force")
    text = make_starter(lesson, numbers, options.out, options.variant)
    write_atomically(path, text)
    print(f"{path}: {len(numbers)} exercises, {_points(numbers):g} points")
    print(f"  next: open it, look for NotImplementedError, then  python -m common.grade {path}")


if __name__ == "__main__":
    sys.exit(main())
