"""A lesson as slides: `python -m common.slides 01 [--out DIR]` writes one page, for no network.

The text cells, the blocks with their docstrings, the paper's table, `run`, and the figures of the
lesson's newest runs. Arrow keys turn the page, F fills the screen, printing gives a PDF.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import OneLineParser, exit_codes
from common.engine.files import write_atomically
from common.engine.report import figure_html, page
from common.lessons import lesson_file
from common.notebook import read_cells

try:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
except ImportError:  # for those who want colours
    HtmlFormatter = None

# Heights are counted in lines of text. A page has room for 17; the browser shrinks what is higher,
# and enlarges what is lower, down to 3/4 of the size.
FULL = 20.0
CODE = 0.62  # height of a line of code

# Code that is shown: a module, what has a doctest, the table, the run, the answers to questions.
MODULE = r"(nn\.Module|Classifiers?)\)"
SHOWN = re.compile(MODULE + r"|^ *>>> |^TABLE\b|^def run\(|^if live\(", re.MULTILINE)


class Block(NamedTuple):
    """What is not to be torn apart between two slides."""

    html: str
    height: float
    heading: str = ""  # of a new slide, which begins with this block


def make_slides(path: Path, runs: Path) -> str:
    """The page of the lesson at `path`, with the figures of its newest runs in `runs`."""
    blocks: list[Block] = []
    for cell in read_cells(path).cells:
        if cell.cell_type == "markdown":
            blocks += text_blocks(cell.source)
        elif SHOWN.search(cell.source):
            blocks += code_blocks(cell.source)
    blocks += figure_blocks(runs / path.stem)

    slides: list[tuple[str, str]] = []
    heading, filled = path.stem, FULL
    for block in blocks:
        heading = block.heading or heading
        if block.heading or (filled and filled + block.height > FULL):
            slides.append((heading, ""))
            filled = 0.0
        slides[-1] = (heading, slides[-1][1] + block.html)
        filled += block.height
    body = "\n".join(
        f"<section><h2>{_markdown().renderInline(heading)}</h2><div>{content}</div></section>"
        for heading, content in slides
    )
    body += "\n<nav><button>‹</button> <span></span> <button>›</button></nav>"
    colours = HtmlFormatter(style="xcode").get_style_defs(".highlight") if HtmlFormatter else ""
    return page(path.stem, body, STYLE + colours, SCRIPT)


# -------------------------------------------------------------------------------------------- text


def _markdown() -> Any:
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    def formula(content: str, options: dict[str, bool]) -> str:
        return formula_svg(content, options["display_mode"])

    parser = MarkdownIt("commonmark").enable("table")
    return parser.use(dollarmath_plugin, renderer=formula, double_inline=True)


def text_blocks(source: str) -> Iterator[Block]:
    """A text cell's paragraphs, lists, tables and formulas; folded answers stay in one piece."""
    from markdown_it.tree import SyntaxTreeNode

    parser = _markdown()
    heading, html, height = "", "", 0.0
    for node in SyntaxTreeNode(parser.parse(source)).children:
        block = node.to_tokens()
        if block[0].type == "heading_open":
            heading = block[1].content
            continue
        html += parser.renderer.render(block, parser.options, {})
        height += _height(block) if not height or "<summary" in html else 0.0
        if html.count("<details") == html.count("</details"):
            yield Block(html, height, heading)
            heading, html, height = "", "", 0.0
    if heading:
        yield Block("", 0.0, heading)


def _height(block: list[Any]) -> float:
    """Lines of text that a block takes, about."""
    lines = 0.7
    for token in block:
        if token.type == "inline":
            lines += -(-len(token.content) // 84) + 0.25
        elif token.type in ("fence", "code_block"):
            lines += CODE * token.content.count("\n")
        elif token.type.startswith("math_block"):
            lines += 2
    return lines


def formula_svg(tex: str, display: bool) -> str:
    """A formula as SVG in the text's own colour and size, drawn by matplotlib."""
    from matplotlib import rc_context
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import TextPath

    # What matplotlib's TeX doesn't know by the same name.
    known = re.sub(
        r"\\underbrace\{(.+?)\}_\{(.+?\})\}", r"\\underset{\2}{\1}", " ".join(tex.split())
    )
    known = re.sub(r"\\(le|ge)\b", r"\\\1q", known)
    size = 100  # units to an em
    with rc_context({"mathtext.fontset": "cm"}):
        try:
            outline = TextPath((0, 0), f"${known}$", size=size)
        except ValueError:
            return f"<code>{escape(tex)}</code>"
    path = ""
    for points, code in outline.iter_segments(simplify=False):
        if code == Outline.CLOSEPOLY:
            path += "Z"
        else:
            points = points.reshape(-1, 2) * (1, -1)  # SVG's y points down
            path += " MLQC"[code] + " ".join(f"{v:.0f}" for v in points.flat)
    box = outline.get_extents()
    x, y, width, height = box.x0 - 4, -box.y1 - 4, box.width + 8, box.height + 8
    style = f"width:{width / size:.2f}em"
    if not display:
        style += f";vertical-align:{(box.y0 - 4) / size:.2f}em"
    return (
        f'<svg class="{"display" if display else "inline"}" style="{style}" role="img" '
        f'aria-label="{escape(tex, quote=True)}" '
        f'viewBox="{x:.0f} {y:.0f} {width:.0f} {height:.0f}"><path d="{path}"/></svg>'
    )


# -------------------------------------------------------------------------------------------- code


def code_blocks(source: str) -> Iterator[Block]:
    """A code cell's classes and functions without their doctests; one that is longer than a page in
    parts of about one length, torn at empty lines.
    """
    source = re.sub(r"\n*( *>>> .*\n)( *(?!\"\"\")\S.*\n)*", "\n", source)
    lines = re.sub(r'\n\n+( *""")', r"\n\1", source).splitlines()
    starts = [
        min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        for node in ast.parse("\n".join(lines)).body
    ]
    for begin, end in itertools.pairwise([0, *starts[1:], len(lines)]):
        unit = lines[begin:end]
        pages = math.ceil(CODE * len(unit) / FULL)
        gaps = [i for i, line in enumerate(unit) if not line]
        cuts = [0]
        for cut in (len(unit) * n // pages for n in range(1, pages)):
            near = [i for i in gaps if abs(i - cut) < 0.3 * len(unit) / pages]
            cuts.append(min(near, key=lambda i: abs(i - cut), default=cut))
        for first, last in itertools.pairwise([*cuts, len(unit)]):
            text = "\n".join(unit[first:last]).strip("\n")
            yield Block(_highlight(text), CODE * (text.count("\n") + 2))


def _highlight(code: str) -> str:
    if HtmlFormatter is None:
        return f"<pre>{escape(code)}</pre>"
    return highlight(code, PythonLexer(), HtmlFormatter())


# ----------------------------------------------------------------------------------------- figures


def figure_blocks(runs: Path) -> Iterator[Block]:
    """The figures of the newest finished run, and of the newest of each experiment."""

    def age(path: Path) -> float:
        return path.stat().st_mtime

    newest: dict[str, Path] = {}
    for report in sorted(runs.glob("*/report.html"), key=age):
        kind = re.sub(r"-s\d+-\d{8}-.*", "", report.parent.name)
        newest[kind if (report.parent / "experiment.json").exists() else ""] = report.parent
    for folder in newest.values():
        for figure in sorted(folder.glob("*.png"), key=age):
            html = figure_html(figure.read_bytes(), figure.name, folder.name)
            yield Block(html, FULL, figure.stem.replace("_", " "))


STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #556; --line: #ddd; --card: #f5f6f8;
        --page: #fff; }
html { font-size: min(1.5625vw, 2.7778vh); }  /* 20 px on 1280 x 720; all else follows */
body { font-size: 1.15rem; }
main { max-width: none; margin: 0; padding: 0; }
section { width: 100vw; height: 100vh; padding: 1.6rem 3rem 2rem; overflow: hidden;
          display: none; flex-direction: column; }
section.now { display: flex; }
section > div { flex: 1; min-height: 0; overflow: hidden; }
section h2 { font-size: 1.6rem; margin: 0 0 .6rem; }
p, ul, ol, table { margin: .4rem 0; }
li { margin: .2rem 0; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
p code, li code, td code { font-size: .9em; background: var(--card); padding: 0 .2em; }
pre { margin: .4rem 0; font-size: .8rem; line-height: 1.32; background: var(--card);
      padding: .4rem .8rem; border-radius: .4rem; }
table { font-size: 1em; }
summary { font-size: 1em; margin: .5rem 0 0; }
svg { background: none; fill: currentColor; max-width: 100%; overflow: visible; }
svg.display { display: block; margin: .8rem auto; }
figure { height: 100%; margin: 0; display: flex; flex-direction: column; }
figure label { flex: 1; min-height: 0; background: none; }
figure img { width: 100%; height: 100%; object-fit: contain; }
figure::after { display: none; }
figcaption { font-size: .7rem; }
nav { position: fixed; right: 1rem; bottom: .5rem; color: var(--soft); font-size: .8rem; }
nav button { font: inherit; color: inherit; background: none; border: 0; cursor: pointer; }
@page { size: 1280px 720px; margin: 0; }
@media print {
  html { font-size: 20px; } nav { display: none; }
  section, section.now { display: flex; width: 1280px; height: 720px; break-after: page; }
}
"""

SCRIPT = """
const slides = [...document.querySelectorAll('section')];
const [back, forth] = document.querySelectorAll('nav button');

function show(number) {
  const at = Math.max(1, Math.min(slides.length, number || 1));
  slides.forEach((slide, i) => slide.classList.toggle('now', i === at - 1));
  document.querySelector('nav span').textContent = at + ' / ' + slides.length;
  history.replaceState(null, '', '#' + at);
  fit(slides[at - 1]);
  return at;
}

// As large as there is room for.
function fit(slide) {
  const content = slide.querySelector('div');
  const tooLarge = () => content.scrollHeight > content.clientHeight + 1 ||
                         content.scrollWidth > content.clientWidth + 1;
  if (content.querySelector('figure')) return;
  for (let size = 135; size >= 50; size -= 5) {
    content.style.zoom = size + '%';
    if (!tooLarge()) return;
  }
}

let at = show(+location.hash.slice(1));
const turn = by => { at = show(at + by); };
back.addEventListener('click', () => turn(-1));
forth.addEventListener('click', () => turn(1));
addEventListener('hashchange', () => { at = show(+location.hash.slice(1)); });
addEventListener('toggle', () => fit(slides[at - 1]), true);  // a folded answer, opened
addEventListener('resize', () => fit(slides[at - 1]));
addEventListener('keydown', event => {
  if (event.target.closest?.('summary') && [' ', 'Enter'].includes(event.key)) return;
  const steps = {ArrowRight: 1, ArrowDown: 1, PageDown: 1, ' ': 1, Enter: 1,
                 ArrowLeft: -1, ArrowUp: -1, PageUp: -1, Backspace: -1,
                 Home: -slides.length, End: slides.length};
  if (event.key in steps) { event.preventDefault(); turn(steps[event.key]); }
  if (event.key === 'f') document.documentElement.requestFullscreen();
});
"""


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m common.slides", description=__doc__.split("\n\n")[0])
    parser.add_argument("lesson", nargs="+", help="number of a lesson, 01 to 08")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="default: here")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    options = parser.parse_args(argv)
    with exit_codes():
        for path in map(lesson_file, options.lesson):
            target, html = options.out / f"{path.stem}.html", make_slides(path, options.runs)
            write_atomically(target, html)
            print(f"{target}: {html.count('<section')} slides")


if __name__ == "__main__":
    main()
