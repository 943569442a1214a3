"""Slides show all text, every block and every formula of a lesson, and load nothing."""

from __future__ import annotations

import ast
import os
import re
from html import unescape
from pathlib import Path

import pytest

pytest.importorskip("jupytext")

from common import plotting, slides
from common.lessons import ROOT, lesson_names
from common.notebook import lesson_file
from tests.conftest import seen_in_browser


def words(html: str) -> list[str]:
    return re.sub(r"<[^>]*>", " ", unescape(html)).split()


@pytest.mark.parametrize("name", lesson_names())
def test_a_lesson_as_slides(name: str, tmp_path: Path) -> None:
    path = ROOT / f"{name}.py"
    page = slides.make_slides(path, tmp_path)
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"<code>[^<]*\\[a-z]", page), "a formula that could not be drawn"
    assert page.count("<svg") >= len(re.findall(r"\$\$", source)) // 2
    assert not re.search(r"(src|href)=|https?://", page)
    text = "".join(words(page))
    for block in ast.parse(source).body:
        if isinstance(block, ast.ClassDef) and "def forward(" in ast.unparse(block):
            assert f"class{block.name}(" in text
    for heading in re.findall(r"^# #+ (.*)", source, re.MULTILINE):
        assert "".join(words(re.sub(r"[`*$]", "", heading))) in text, heading


LOOK = """
const cut = () => {
  const content = slides[at - 1].querySelector('div');
  return content.scrollHeight > content.clientHeight + 1 ||
         content.scrollWidth > content.clientWidth + 1;
};
const seen = slides.map((_, i) => { at = show(i + 1); return cut(); });
seen.push(...slides.map((slide, i) => {
  slide.style.height = '140vh';  // a window of 4:3, then full screen
  at = show(i + 1);
  slide.style.height = '';
  dispatchEvent(new Event('resize'));
  return cut();
}));
document.body.innerHTML = '<pre id="seen">' + JSON.stringify(seen) + '</pre>';
</script>"""


def test_no_slide_is_cut_not_even_in_a_window_of_another_shape(tmp_path: Path) -> None:
    for number in ("02", "07"):  # the fullest
        page = slides.make_slides(lesson_file(number), tmp_path)
        assert not any(seen_in_browser(tmp_path, page.replace("</script>", LOOK))), number


def test_a_long_class_is_torn_where_a_method_ends() -> None:
    method = "    def f{}(self) -> int:\n" + "        x = 1\n" * 12 + "        return x\n"
    source = "class Long:\n" + "\n".join(method.format(i) for i in range(6))
    blocks = list(slides.code_blocks(source))
    assert all(block.height < 1.3 * slides.FULL for block in blocks)
    for block in blocks[1:]:
        assert words(block.html)[0] == "def", block.html
    joined = "".join(word for block in blocks for word in words(block.html))
    assert joined == "".join(source.split())


def test_the_figures_of_the_newest_run(tmp_path: Path) -> None:
    for i, run in enumerate(["a-digits-s0-20260101-000000", "b-digits-s0-20260102-000000"]):
        figure = plotting.curves({"a": [1, 2]}, "x", "y", "t")
        plotting.save(figure, tmp_path / run / "learning_curves.png")
        (tmp_path / run / "report.html").write_text("")
        os.utime(tmp_path / run / "report.html", (i, i))
    (block,) = slides.figure_blocks(tmp_path)
    assert "b-digits" in block.html and block.heading == "learning curves"
