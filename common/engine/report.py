"""One self-contained page that shows a run: facts, figures, tables. It needs no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from numbers import Integral, Real
from pathlib import Path

from common.engine.files import write_atomically

LONG_TABLE = 30  # rows; longer ones are folded
DPI = 130  # of the figures, as common.plotting saves them


def write_report(
    folder: Path,
    title: str,
    facts: Mapping[str, object],
    tables: Mapping[str, Sequence[Mapping[str, object]]],
    figures: Sequence[Path],
    *,
    notes: Sequence[str] = (),
    captions: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder/report.html` and return its path.

    Args:
        facts: name and value, the numbers one looks for first.
        tables: heading and rows; columns are the rows' keys, in order of appearance.
        figures: PNG files, embedded in this order.
        notes: sentences under the title: what was run, the verdict.
        captions: caption by the figure's file stem; a figure without one has only its own title.

    Raises:
        FileNotFoundError: a figure is missing.
        ValueError: a figure is not a PNG.
    """
    captions = captions or {}
    body = [f"<h1>{escape(title)}</h1>"]
    body += [f'<p class="note">{escape(note)}</p>' for note in notes]
    if facts:
        body.append(_facts(facts))
    body += [_figure(path, captions.get(path.stem, "")) for path in map(Path, figures)]
    body += [_table(heading, rows) for heading, rows in tables.items() if rows]
    page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))
    path = Path(folder) / "report.html"
    write_atomically(path, page)
    return path


def _facts(facts: Mapping[str, object]) -> str:
    items = []
    for name, value in facts.items():
        text = _text(value)
        wide = ' class="wide"' if len(text) > 28 else ""
        items.append(f"<div{wide}><dt>{escape(_words(name))}</dt><dd>{escape(text)}</dd></div>")
    return '<dl class="facts">' + "".join(items) + "</dl>"


def _figure(path: Path, caption: str) -> str:
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{path} is not a PNG")
    # At 96 CSS pixels an inch all figures have text of one size; a phone scrolls the wide ones.
    width = int.from_bytes(data[16:20], "big") * 96 // DPI
    size = f'class="wide" width="{width}"' if width > 700 else f'width="{width}"'
    source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    alt = escape(caption or _words(path.stem))
    return (
        f'<figure><div class="scroll"><img alt="{alt}" {size} src="{source}"></div>{text}</figure>'
    )


def _table(heading: str, rows: Sequence[Mapping[str, object]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numeric = {column for column in columns if all(_is_number(row.get(column)) for row in rows)}

    def cell(tag: str, column: str, text: str) -> str:
        kind = ' class="number"' if column in numeric else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", column, _words(column)) for column in columns) + "</tr>"]
    lines += [
        "<tr>" + "".join(cell("td", c, _text(row.get(c))) for c in columns) + "</tr>"
        for row in rows
    ]
    lines.insert(1, "</thead><tbody>")
    table = '<div class="scroll"><table><thead>' + "\n".join(lines) + "</tbody></table></div>"
    if len(rows) > LONG_TABLE:
        return (
            f"<details><summary>{escape(heading)} ({len(rows):,} rows)</summary>{table}</details>"
        )
    return f"<h2>{escape(heading)}</h2>{table}"


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def _text(value: object) -> str:
    """A value as a reader wants it: 11,181,642 and 0.9472 and yes.

    >>> [_text(v) for v in (11181642, 0.94722, 1234567.8, True, None, "as is")]
    ['11,181,642', '0.9472', '1,234,568', 'yes', '–', 'as is']
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{value:,}"
    if isinstance(value, Real):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def _words(name: str) -> str:
    """A field's name as words: "val_top1" as "val top1"."""
    return str(name).replace("_", " ")


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark;
        --ink: #222; --soft: #667; --line: #ddd; --card: #f5f6f8; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a3a8b3; --line: #3a3d44; --card: #24262b; --page: #17181b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: break-word;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2, summary { font-size: 1.15rem; font-weight: 600; margin: 2rem 0 .5rem; }
summary { cursor: pointer; }
.note { max-width: 45rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem;
         margin: 1rem 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .5rem .75rem; }
.facts .wide { grid-column: 1 / -1; }
.wide dd { font-weight: 400; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff;
      border-radius: .5rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; text-align: center; }
img.wide { min-width: min(40rem, 100vw * 2); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
         white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
"""
