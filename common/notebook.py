"""A lesson as a Jupyter notebook: `python -m common.notebook 01 [--out DIR]`.

jupytext turns the percent cells into cells. What differs from the script: the docstring is text,
and the settings are one line of a cell of their own, since a notebook has no command line.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import OneLineParser, exit_codes
from common.engine.errors import UserError
from common.engine.files import write_atomically
from common.lessons import ROOT, lesson_file, lesson_names

if TYPE_CHECKING:
    from nbformat import NotebookNode

# The line of a lesson that reads the flags, with its comment, and what a notebook has instead.
FLAGS = re.compile(r"\n*(?:^#.*\n)*^config = parse_flags\(.*\n?", re.MULTILINE)
SETTINGS = "config = Config()  # settings go here: Config(epochs=3, seed=1); help(Config) lists all"


def read_cells(path: Path) -> NotebookNode:
    """The lesson's cells; its docstring is a markdown cell.

    Raises:
        UserError: jupytext isn't installed.
    """
    try:
        import jupytext
    except ImportError:
        raise UserError(
            "lessons become notebooks and slides by jupytext: pip install jupytext ipykernel"
        ) from None
    book = jupytext.read(path, fmt="py:percent")
    first = book.cells[0]
    text = ast.get_docstring(ast.parse(first.source))
    if first.cell_type == "code" and text:
        book.cells[0] = _cell("markdown", f"# {text}")
    return book


def make_notebook(path: Path, folder: Path) -> NotebookNode:
    """The notebook of the lesson at `path`, to be run in `folder`."""
    book = read_cells(path)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book.metadata.kernelspec = kernel
    cells = []
    for cell in book.cells:
        rest, found = FLAGS.subn("", cell.source) if cell.cell_type == "code" else ("", 0)
        cells += [_cell("code", rest), _cell("code", SETTINGS)] if found else [cell]
    if folder.resolve() != ROOT:
        course = Path(os.path.relpath(ROOT, folder.resolve())).as_posix()
        path_cell = f"import sys\n\nsys.path.insert(0, {course!r})  # where common/ is"
        cells.insert(1, _cell("code", path_cell))
    book.cells = cells
    return book


def _cell(kind: str, source: str) -> NotebookNode:
    from nbformat import v4

    return (v4.new_code_cell if kind == "code" else v4.new_markdown_cell)(source)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m common.notebook", description=__doc__.split("\n\n")[0])
    parser.add_argument("lesson", nargs="+", help="number of a lesson, 01 to 08, or all")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="default: here")
    parser.add_argument("--force", action="store_true", help="overwrite a notebook that is there")
    options = parser.parse_args(argv)
    numbers = lesson_names() if options.lesson == ["all"] else options.lesson
    with exit_codes():
        for path in map(lesson_file, numbers):
            target = options.out / f"{path.stem}.ipynb"
            if target.exists() and not options.force:
                raise UserError(f"{target} exists, and may hold your work: move it or add --force")
            book = make_notebook(path, options.out)
            import nbformat

            write_atomically(target, nbformat.writes(book) + "\n")
            print(
                f"{target}: {len(book.cells)} cells; open it, or run it with:  "
                f"jupyter nbconvert --execute --to notebook --inplace {target}"
            )


if __name__ == "__main__":
    main()
