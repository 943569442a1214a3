"""The page of all runs says what their files say, for runs that were stopped or damaged too."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from common.engine.errors import UserError
from common.engine.overview import write_index
from common.index import main


def make_run(runs: Path, name: str, losses: list[float], **result: object) -> Path:
    folder = runs / "01_resnet_beginner" / name
    folder.mkdir(parents=True)
    config = {
        "lesson": "01_resnet_beginner",
        "model": "resnet8",
        "dataset": "folder",
        "data_dir": "/somewhere/cats",
        "seed": 0,
        "epochs": 3,
        "experiment": "",
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = [f"{i},{loss},{i / 10}" for i, loss in enumerate(losses, 1)]
    (folder / "history.csv").write_text("\n".join(["epoch,train_loss,val_top1", *lines]) + "\n")
    if result:
        (folder / "result.json").write_text(json.dumps({**config, **result}))
        (folder / "report.html").write_text("")
    return folder


def rows(path: Path) -> dict[str, list[str]]:
    """The cells' text of each run."""
    found = re.findall(r'<tr data-run="[^/]*/([^"]*)">(.*?)</tr>', path.read_text())
    return {
        name: [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", cells)]
        for name, cells in found
    }


def test_finished_stopped_and_damaged_runs(tmp_path: Path) -> None:
    make_run(tmp_path, "done", [3.0, 2.0, 1.0], test_top1=0.875, params=12345, epochs=3)
    make_run(tmp_path, "stopped", [3.0, float("nan")])
    (make_run(tmp_path, "damaged", [1.0]) / "config.json").write_text("{")
    experiment = make_run(tmp_path, "asked", [])
    (experiment / "history.csv").unlink()
    (experiment / "experiment.json").write_text('{"verdict": ["<b>holds</b>"]}')

    shown = rows(write_index(tmp_path))
    assert sorted(shown) == ["asked", "done", "stopped"]
    assert shown["done"][1:9] == ["01", "resnet8", "cats", "0", "3", "87.50%", "", "12,345"]
    assert shown["stopped"][1:7] == ["01", "resnet8", "cats", "0", "2 of 3", ""]
    assert "&lt;b&gt;holds&lt;/b&gt;" in shown["asked"]

    page = (tmp_path / "index.html").read_text()
    assert 'href="01_resnet_beginner/done/report.html"' in page
    assert 'href="01_resnet_beginner/stopped' not in page
    assert "src=" not in page and "http:" not in page and "https:" not in page
    # Two runs in two charts; losses fall from the top of the chart to its bottom.
    lines = re.findall(r'<polyline data-run="[^"]*/done" points="([^"]*)"', page)
    assert len(lines) == 2 and page.count("<polyline ") == 4
    heights = [float(point.split(",")[1]) for point in lines[1].split()]
    assert heights == sorted(heights) and heights[1] == pytest.approx(sum(heights) / 3, abs=0.1)


def test_no_two_ticks_of_a_chart_have_the_same_label(tmp_path: Path) -> None:
    """It said "10%, 10%, 9%" beside runs of one epoch that were nearly alike."""
    make_run(tmp_path, "one", [2.3401, 2.3409])
    for chart in write_index(tmp_path).read_text().split("<svg ")[1:]:
        ticks = re.findall('class="end">([^<]*)<', chart)
        assert len(ticks) == len(set(ticks)) >= 4, ticks
    (history,) = tmp_path.rglob("history.csv")
    history.write_text("epoch,train_loss,val_top1\n1,2.34,0.0859\n2,2.35,0.1016\n")
    chart = write_index(tmp_path).read_text().split("<svg ")[1]
    ticks = re.findall('class="end">([^<]*)<', chart)
    assert len(ticks) == len(set(ticks)) and "8.5%" in ticks, ticks


def test_an_empty_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="holds no run folders"):
        write_index(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        main([str(tmp_path / "nothing")])
    assert leaving.value.code == 2 and capsys.readouterr().err.count("\n") == 1
