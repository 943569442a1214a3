"""Every lesson as a notebook: made by jupytext, run from the first to the last cell by nbclient."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common import notebook
from common.lessons import ROOT, lesson_names

if TYPE_CHECKING:
    from jupyter_client.manager import KernelManager
    from nbformat import NotebookNode

# What makes a lesson small enough for a test, beside smoke=True.
MINIATURE = {
    "01": "model='resnet20', ",
    "02": "image_size=8, ",
    "03": "model='googlenet', width_mult=0.25, ",
    "06": "model='densenet40_k12', growth_rate=4, ",
    "07": "model='lenet5,simple_cnn', seeds=1, ",
    "08": "model='resnet20', compare=False, ",
}
# Coarser pictures, and 5 timed passes in place of 50: what is seen in them is no test's business.
QUICK = """
from common import plotting, profiling
from common.engine.measure import time_passes
plotting.DPI = 50
profiling.time_passes = lambda model, x, *rest, **more: time_passes(model, x, seconds=0.0)
"""


def test_without_jupytext_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "jupytext", None)
    with pytest.raises(SystemExit) as leaving:
        notebook.main(["01", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and "pip install jupytext" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_notebook_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("jupytext")
    notebook.main(["1", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    path.write_text("a student's work")
    with pytest.raises(SystemExit):
        notebook.main(["01", "--out", str(tmp_path)])
    assert path.read_text() == "a student's work" and "--force" in capsys.readouterr().err
    notebook.main(["01", "--out", str(tmp_path), "--force"])
    assert path.read_text().startswith("{")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelManager]:
    """One for all books, which imports torch once."""
    for package in ("jupytext", "ipykernel", "nbclient"):
        pytest.importorskip(package)
    from jupyter_client.manager import start_new_kernel

    elsewhere = str(tmp_path_factory.mktemp("kernel"))  # where no `common` lies
    manager, client = start_new_kernel(kernel_name="python3", cwd=elsewhere)
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture
def run_cells(tmp_path: Path, kernel: KernelManager) -> Callable[..., None]:
    """`run_cells(book)`, each book in an empty namespace of its own."""
    import nbclient

    def run(book: NotebookNode, allow_errors: bool = False) -> None:
        book.cells.insert(0, notebook._cell("code", f"%reset -f\n%cd -q {tmp_path}"))
        nbclient.NotebookClient(book, km=kernel, timeout=300, allow_errors=allow_errors).execute()

    return run


@pytest.mark.timeout(600)
def test_all_lessons_run_from_the_first_to_the_last_cell(
    tmp_path: Path, run_cells: Callable[..., None]
) -> None:
    """In one kernel, which imports torch once."""
    index = tmp_path / "runs" / "index.html"
    for name in lesson_names():
        book = notebook.make_notebook(ROOT / f"{name}.py", tmp_path)
        (settings,) = (c for c in book.cells if c.source.startswith("config = Config("))
        small = MINIATURE.get(name[:2], "")
        settings.source = f"config = Config({small}dataset='digits', batch_size=8, smoke=True)"
        book.cells.insert(2, notebook._cell("code", QUICK))  # behind the cell that finds common
        run_cells(book)

        outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
        printed = "".join(o.text for o in outputs if o.output_type == "stream")
        kinds = {key for o in outputs for key in o.get("data", {})}
        assert not [o.text for o in outputs if o.get("name") == "stderr"], name
        assert len(outputs) < 60 and "\r" not in printed, name
        assert "image/png" in kinds, f"{name}: figures are shown"
        (page,) = (tmp_path / "runs" / name).glob("*/report.html")
        assert f"report     {page.relative_to(tmp_path)}, all runs: runs/index.html" in printed
        assert "ipykernel" not in page.read_text(), name
        assert f'href="{page.relative_to(tmp_path / "runs")}"' in index.read_text()


LIVE = """
from common.live import digits, live, show
from common.config import TrainConfig

if live():
    print("here")
---
import another
---
show(digits(2), (1, 2))
---
class Block:
    def forward(self):
        return "its source"

show(Block)
---
TrainConfig(epochs=0)
---
from common.cli import exit_codes
with exit_codes():
    open("no such file")
"""


def test_live_cells_and_errors(tmp_path: Path, run_cells: Callable[..., None]) -> None:
    book = notebook.make_notebook(ROOT / f"{lesson_names()[0]}.py", tmp_path)
    (tmp_path / "another.py").write_text('from common.live import live\nif live(): print("there")')
    cells = [notebook._cell("code", text) for text in LIVE.split("---\n")]
    book.cells = [book.cells[1], *cells]
    run_cells(book, allow_errors=True)
    here, imported, picture, source, wrong, missing = (cell.outputs for cell in book.cells[2:])
    assert here[0].text == "here\n" and imported == []
    assert [o.output_type for o in picture] == ["display_data", "stream"]
    assert "image/png" in picture[0].data and picture[1].text == "(1, 2)\n"
    assert source[0].text.startswith("class Block:") and "its source" in source[0].text
    assert wrong[0].traceback == ["error: --epochs 0: the least that makes sense is 1"]
    assert len(missing[0].traceback) == 1 and "no such file" in missing[0].traceback[0]


def test_flags_are_honoured_in_ipython() -> None:
    pytest.importorskip("IPython")
    lesson = f"{lesson_names()[0]}.py"
    command = [sys.executable, "-m", "IPython", "--colors=nocolor", lesson, "--", "--epochs", "0"]
    left = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert left.returncode == 2 and "--epochs 0" in left.stderr, left.stdout
