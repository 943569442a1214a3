"""Every lesson as a notebook: made by jupytext, run from the first to the last cell by nbclient."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common import notebook
from common.lessons import ROOT, lesson_names

# What makes a lesson small enough for a test, beside smoke=True.
MINIATURE = {
    "01": "model='resnet20', ",
    "02": "image_size=8, ",
    "03": "model='googlenet', ",
    "06": "model='densenet40_k12', ",
    "07": "model='lenet5,simple_cnn', seeds=1, ",
    "08": "model='resnet20', compare=False, ",
}


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


@pytest.mark.timeout(600)
def test_all_lessons_run_from_the_first_to_the_last_cell(tmp_path: Path) -> None:
    """In one kernel, which imports torch once; each begins with an empty namespace."""
    pytest.importorskip("jupytext")
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    client.stop_channels()
    try:
        for name in lesson_names():
            book = notebook.make_notebook(ROOT / f"{name}.py", tmp_path)
            (settings,) = (c for c in book.cells if c.source.startswith("config = Config("))
            small = MINIATURE.get(name[:2], "")
            settings.source = f"config = Config({small}dataset='digits', smoke=True)"
            book.cells[0:0] = [notebook._cell("code", "%reset -f")]
            nbclient.NotebookClient(book, km=manager, timeout=300).execute()

            outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
            printed = "".join(o.text for o in outputs if o.output_type == "stream")
            kinds = {key for o in outputs for key in o.get("data", {})}
            assert not [o.text for o in outputs if o.get("name") == "stderr"], name
            assert len(outputs) < 60 and "\r" not in printed, name
            assert "image/png" in kinds, f"{name}: figures are shown"
            (page,) = (tmp_path / "runs" / name).glob("*/report.html")
            assert f"report     {page.relative_to(tmp_path)}" in printed
            assert "ipykernel" not in page.read_text(), name
    finally:
        manager.shutdown_kernel(now=True)


def test_flags_are_honoured_in_ipython() -> None:
    pytest.importorskip("IPython")
    lesson = f"{lesson_names()[0]}.py"
    command = [sys.executable, "-m", "IPython", "--colors=nocolor", lesson, "--", "--epochs", "0"]
    left = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert left.returncode == 2 and "--epochs 0" in left.stderr, left.stdout
