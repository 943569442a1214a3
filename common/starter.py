"""Make the starter of an assignment out of its lesson: `python -m common.starter 01 --out DIR`.

The lesson stays as it is, marker-free. The manifest says which classes and functions are the
exercises; their bodies go, their signatures and docstrings stay. What is made anew from the lesson
can't drift away from it.
"""

from __future__ import annotations

import ast
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from common.engine.flags import OneLineParser
from common.grading import variants
from common.grading.exercises import ROOT, exercises, file_name, lesson_path, manifests, worth
from common.grading.holes import take_out

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.grading.exercises import Exercise


def make_starter(
    lesson: str,
    only: Iterable[str] | None = None,
    folder: Path | None = None,
    variant: int = 0,
) -> str:
    """The text of the starter of `lesson`, with the exercises `only` (numbers; all where None)
    taken out.

    Args:
        folder: where it will lie, from where it finds the course.
        variant: a seed, see common/grading/variants.py; 0: the lesson as it is.
    """
    chosen = [
        variants.with_hint(e, variant)
        for e in exercises(lesson).values()
        if only is None or e.number in set(only)
    ]
    path = lesson_path(lesson)
    source = variants.texts(variants.drawn(variant)).get(path.relative_to(ROOT)) or path.read_text(
        encoding="utf-8"
    )
    head = [*wrapped(variants.head(variant, lesson)[2:], "# "), ""] if variant else []
    return _with_assignment(take_out(source, chosen), lesson, chosen, folder or ROOT, head)


# The first cell of a starter. The course stands before the starter's own folder, so that a lesson
# that builds on another finds the lesson and not its starter.
_FIND_COURSE = """
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


def _with_assignment(
    source: str, lesson: str, chosen: list[Exercise], folder: Path, head: list[str]
) -> str:
    """Behind the lesson's docstring the lines of `head`, a markdown cell that lists what to do and
    how to check it, and a cell that finds the course.
    """
    name = file_name(lesson)
    rows = worth((lesson,))
    text = [
        *head,
        "# %% [markdown]",
        "# ## Your exercises",
        "#",
        "# Every `raise NotImplementedError` below marks a piece that is yours to write. The",
        "# docstrings say what goes in and what comes out. Keep names and signatures: the rest of",
        "# the script and the checks rely on them.",
        "#",
    ]
    for exercise in chosen:
        total = sum(row.points for row in rows if row.exercise == exercise.number)
        parts = ", ".join(f"`{part}`" for part in exercise.parts)
        worth_it = f"({exercise.level}, {total:g} points)"
        text.append(f"# - **{exercise.number} {exercise.title}** {worth_it}: {parts}.")
        text += wrapped(f"Hidden cases: {exercise.kind}.", "#   ")
    text += [
        "#",
        "# Run it: it goes as far as the first piece that is missing. Check yourself, as often as",
        "# you like, from the course's folder:",
        "#",
        f"#     python {name}",
        f"#     python -m common.grade path/to/{name}",
        "#",
        "# If it does not find `common`, say where the course is: PYTHONPATH=path/to/course",
    ]
    course = os.path.relpath(ROOT, folder.resolve())
    text += _FIND_COURSE.format(course=course).splitlines()
    lines = source.splitlines()
    first, *others = ast.parse(source).body
    docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    start = first.end_lineno if docstring else 0
    for node in others:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            start = node.end_lineno  # it must come first
    return "\n".join([*lines[:start], "", *text, *lines[start:]]) + "\n"


def wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 99, initial_indent=indent, subsequent_indent=indent)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0; 2 for a lesson that has no exercises, a folder that can't be written, a file
    in the way.
    """
    parser = OneLineParser(prog="python -m common.starter", description=__doc__.split("\n\n")[0])
    parser.add_argument("lesson", nargs="+", help="number of a lesson, 01 to 08, or all")
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
    lessons = (
        list(manifests()) if options.lesson == ["all"] else [n.zfill(2)[:2] for n in options.lesson]
    )
    if not 0 <= options.variant < 2**31:
        return _fail(f"--variant {options.variant}: a number from 0 to {2**31 - 1}")
    for lesson in lessons:
        if lesson not in manifests():
            return _fail(
                f"lesson {lesson} has no exercises; there are some in {', '.join(manifests())}"
            )
        known = exercises(lesson)
        unknown = [
            n for n in options.only or () if n.split(".")[0].zfill(2) == lesson and n not in known
        ]
        if unknown:
            return _fail(f"no exercise {unknown[0]} in lesson {lesson}; it has {', '.join(known)}")
        path = options.out / file_name(lesson)
        if path.resolve() == lesson_path(lesson).resolve():
            return _fail(f"{path} is the lesson itself: choose another folder")
        if path.exists() and not options.force:
            return _fail(f"{path} exists, and may hold somebody's work: remove it or add --force")
        only = options.only and [n for n in options.only if n in known]
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            text = make_starter(lesson, only, options.out, options.variant)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            return _fail(f"can't write {path}: {error.strerror}")
        numbers = list(known) if only is None else only
        total = sum(row.points for row in worth((lesson,)) if row.exercise in numbers)
        print(f"{path}: {len(numbers)} exercises, {total:g} points")
        print(f"  next: open it, look for NotImplementedError, then  python -m common.grade {path}")
    return 0


def _fail(message: str) -> int:
    print(f"starter: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
