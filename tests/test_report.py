"""The report is one page that holds everything, needs no network and believes no name."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from common.engine.report import outcome_of, write_report
from common.engine.verdicts import wilson

HOSTILE = '<script>alert("1")</script> & <img src=x onerror=alert(1)>'
# The smallest PNG: one transparent pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJ"
    "RU5ErkJggg=="
)


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every tag was closed in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def figures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "learning_curves.png", tmp_path / 'a"b<c.png']
    for i, path in enumerate(paths):
        path.write_bytes(PNG + bytes([i]))
    return paths


def test_every_figure_is_embedded_and_nothing_comes_from_outside(
    tmp_path: Path, figures: list[Path]
) -> None:
    path = write_report(tmp_path, "A run", {"test_top1": 0.9472}, {}, figures)
    assert path == tmp_path / "report.html"
    page = Page(path)
    sources = [image["src"] for image in page.all("img")]
    head = "data:image/png;base64,"
    assert all(source.startswith(head) for source in sources)
    assert [base64.b64decode(s[len(head) :]) for s in sources] == [f.read_bytes() for f in figures]
    assert [image["alt"] for image in page.all("img")] == ["learning curves", 'a"b<c']
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        assert "href" not in attributes and "srcset" not in attributes
        assert tag == "img" or "src" not in attributes
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    assert page.open == []


def test_hostile_names_are_text(tmp_path: Path, figures: list[Path]) -> None:
    rows = [{"name": HOSTILE, HOSTILE: 1.0}]
    path = write_report(
        tmp_path, HOSTILE, {HOSTILE: HOSTILE}, {HOSTILE: rows}, figures, notes=[HOSTILE]
    )
    page = Page(path)
    assert len(page.all("img")) == len(figures) and not page.all("script")
    # title, h1, note, fact's name and value, table's heading, a cell and a column
    assert page.texts.count(HOSTILE) == 8
    assert page.open == []


def test_tables_show_every_row_and_column_of_uneven_rows(tmp_path: Path) -> None:
    rows = [
        {"name": "cat", "f1": np.float32(0.5), "support": np.int64(12345)},
        {"name": "dog", "note": True},
    ]
    page = Page(write_report(tmp_path, "t", {}, {"Per class": rows, "Empty": []}, []))
    cells = [text for text in page.texts if text.strip()]
    start = cells.index("Per class")
    assert cells[start:] == [
        "Per class",
        *("name", "f1", "support", "note"),
        *("cat", "0.5", "12,345", "–"),
        *("dog", "–", "–", "yes"),
    ]
    classes = [attributes.get("class") for attributes in page.all("th")]
    assert classes == [None, "number", "number", None]


def test_long_tables_are_folded(tmp_path: Path) -> None:
    rows = [{"name": str(i)} for i in range(100)]
    page = Page(write_report(tmp_path, "t", {}, {"Per class": rows}, []))
    assert len(page.all("details")) == 1 and len(page.all("tr")) == 101
    assert "Per class (100 rows)" in page.texts and page.open == []


def test_only_png_figures_are_embedded(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<script>")
    with pytest.raises(ValueError, match=r"page\.png is not a PNG"):
        write_report(tmp_path, "t", {}, {}, [tmp_path / "page.png"])


def test_a_missing_figure_leaves_the_old_report(tmp_path: Path) -> None:
    path = write_report(tmp_path, "old", {}, {}, [])
    before = path.read_bytes()
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path, "new", {}, {}, [tmp_path / "no.png"])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("right", "majority", "told"),
    [(30, 0.1, True), (36, 0.1, True), (90, 0.1, False), (90, 0.3, True)],
)  # of 300 images in ten classes
def test_a_run_that_learned_nothing_says_so(right: int, majority: float, told: bool) -> None:
    result = {
        "test_top1": right / 300, "test_top1_interval": wilson(right, 300), "test_top5": 0.5,
        "per_class": [{}] * 10, "best_epoch": 1, "train_seconds": 1.0, "latency_ms": 1.0,
        "peak_memory_mb": 1.0, "baselines": {"chance": 0.1, "majority": majority},
    }  # fmt: skip
    assert ("no better than a guess" in outcome_of(result)) == told
