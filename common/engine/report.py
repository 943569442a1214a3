"""Self-contained pages, which need no network: a run's facts, figures and tables, and the shell
that all other pages of the course stand in.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from common.engine.files import write_atomically

LONG_TABLE = 30  # rows; longer ones are folded
DPI = 130  # of the figures
# Found by a search: any two differ by 25 or more in CIELAB, to normal sight and to protanopes,
# deuteranopes and tritanopes (as simulated by Machado et al. 2009), and each stands out from white.
PALETTE = ["#005C9F", "#D96C0B", "#00A561", "#EA4AE8", "#7E2A12", "#1B0262", "#6E4A56"]


def write_report(
    folder: Path,
    title: str,
    facts: Mapping[str, object],
    tables: Mapping[str, Sequence[Mapping[str, object]]],
    figures: Sequence[Path],
    *,
    notes: Sequence[str] = (),
) -> Path:
    """Write `folder/report.html` and return its path.

    Args:
        facts: name and value, the numbers one looks for first.
        tables: heading and rows; columns are the rows' keys, in order of appearance.
        figures: PNG files, embedded in this order.
        notes: sentences under the title: what was run, the verdict.

    Raises:
        FileNotFoundError: a figure is missing.
        ValueError: a figure is not a PNG.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    body += [f'<p class="note">{escape(note)}</p>' for note in notes]
    if facts:
        body.append(_facts(facts))
    body += [figure_html(figure.read_bytes(), figure.name) for figure in figures]
    body += [_table(heading, rows) for heading, rows in tables.items() if rows]
    path = Path(folder) / "report.html"
    write_atomically(path, page(title, "\n".join(body)))
    return path


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """The whole page around `body`, which is HTML already; it may load nothing from outside."""
    allowed = "; script-src 'unsafe-inline'" if script else ""
    script = f"\n<script>\n'use strict';{script}</script>" if script else ""
    return PAGE.format(
        title=escape(title), style=STYLE + style, body=body, allowed=allowed, script=script
    )


def facts_of(result: Mapping[str, Any]) -> dict[str, str]:
    """What one looks for first in a result.json."""
    low, high = result["test_top1_interval"]
    facts = {
        "Test accuracy": f"{result['test_top1']:.2%}{_top5(result)}",
        "With views": _views(result),
        "95% interval": f"{low:.1%} to {high:.1%}, if the test images are drawn at random",
        "Without a network": _baselines(result),
        "Warning": _no_better_than_a_guess(result),
        "Validation accuracy": f"{result['val_top1']:.2%}, at epoch {result['best_epoch']} of "
        f"{result['epochs']}",
        "Parameters": f"{result['params']:,}",
        "Multiply-adds": f"{result['macs'] / 1e6:,.1f} M for one image",
        "Latency": f"{result['latency_ms']:.2f} ms (IQR {result['latency_iqr_ms']:.2f}), batch 1",
        "Peak memory": f"{result['peak_memory_mb']:.1f} MB, inference, batch 1",
        "Training": f"{result['train_seconds']:.0f} s, {result['images_per_second']:,.0f} images/s",
        "Device": f"{result['hardware']}, torch {result['torch_version']}",
    }
    return {name: fact for name, fact in facts.items() if fact}


def outcome_of(result: Mapping[str, Any]) -> str:
    """The last lines of a run on the terminal."""
    low, high = result["test_top1_interval"]
    lines = {
        "test": f"top-1 {result['test_top1']:.2%} (95% interval {low:.1%} to {high:.1%})"
        f"{_top5(result)}, with the weights of epoch {result['best_epoch']}",
        "views": _views(result),
        "beside it": _baselines(result),
        "cost": f"{result['train_seconds']:.0f} s of training, {result['latency_ms']:.2f} ms an "
        f"image, {result['peak_memory_mb']:.0f} MB",
        "warning": _no_better_than_a_guess(result),
    }
    return "\n".join(f"{name:10} {line}" for name, line in lines.items() if line)


def _baselines(result: Mapping[str, Any]) -> str:
    """Of a result that has them: see `common.engine.baselines`."""
    named = {
        "a guess": "chance",
        "the commonest class": "majority",
        "logistic regression on the pixels": "logistic_regression",
    }
    found = result.get("baselines", {})
    return ", ".join(f"{name} {found[key]:.2%}" for name, key in named.items() if key in found)


def _no_better_than_a_guess(result: Mapping[str, Any]) -> str:
    """What to say of a network that the test images can't tell from a guess; "" of any other."""
    found, low = result.get("baselines", {}), result["test_top1_interval"][0]
    if result.get("smoke") or low > max(found.get("chance", -1.0), found.get("majority", -1.0)):
        return ""
    return (
        "the network is no better than a guess: too few steps, a learning rate that is too high or "
        "too low (--find-lr), or labels that don't belong to their images"
    )


def _views(result: Mapping[str, Any]) -> str:
    if "test_top1_views" not in result:
        return ""
    return f"top-1 {result['test_top1_views']:.2%}, shifted and mirrored views averaged"


def _top5(result: Mapping[str, Any]) -> str:
    """Of five classes or fewer it says nothing."""
    return f", top-5 {result['test_top5']:.2%}" if len(result["per_class"]) > 5 else ""


def _facts(facts: Mapping[str, object]) -> str:
    items = []
    for name, value in facts.items():
        text = _text(value)
        wide = ' class="wide"' if len(text) > 28 else ""
        items.append(f"<div{wide}><dt>{escape(_words(name))}</dt><dd>{escape(text)}</dd></div>")
    return '<dl class="facts">' + "".join(items) + "</dl>"


def figure_html(png: bytes, name: str, caption: str = "") -> str:
    """A figure as part of a page.

    Raises:
        ValueError: it is not a PNG.
    """
    if png[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{name} is not a PNG")
    # At 96 CSS pixels an inch all figures have text of one size. A phone shows them whole; a tap
    # gives their full size, to be scrolled.
    width = int.from_bytes(png[16:20], "big") * 96 // DPI
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    alt = escape(caption or _words(name.removesuffix(".png")))
    return (
        f'<figure><label class="scroll"><input type="checkbox" aria-label="full size">'
        f'<img alt="{alt}" width="{width}" src="{source}"></label>{text}</figure>'
    )


def _table(heading: str, rows: Sequence[Mapping[str, object]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    kinds = {
        column: ' class="number"' if all(_is_number(row.get(column)) for row in rows) else ""
        for column in columns
    }

    def line(tag: str, texts: Iterable[str]) -> str:
        cells = (f"<{tag}{kinds[c]}>{escape(t)}</{tag}>" for c, t in zip(columns, texts))
        return f"<tr>{''.join(cells)}</tr>"

    head = line("th", map(_words, columns))
    body = "\n".join(line("td", (_text(row.get(c)) for c in columns)) for row in rows)
    table = (
        f'<div class="scroll"><table><thead>{head}\n</thead><tbody>\n{body}</tbody></table></div>'
    )
    if len(rows) <= LONG_TABLE:
        return f"<h2>{escape(heading)}</h2>{table}"
    return f"<details><summary>{escape(heading)} ({len(rows):,} rows)</summary>{table}</details>"


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
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'{allowed}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>{script}
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark;
        --ink: #222; --soft: #667; --line: #ddd; --card: #f5f6f8; --page: #fff;
        --mark: #fff3c4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a3a8b3; --line: #3a3d44; --card: #24262b; --page: #17181b;
          --mark: #4a4220; }
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
         grid-auto-flow: dense; margin: 1rem 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .5rem .75rem; }
.facts .wide { grid-column: 1 / -1; }
.wide dd { font-weight: 400; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff;
      border-radius: .5rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; text-align: center; }
figure input { position: absolute; opacity: 0; }
figure input:checked + img { max-width: none; }
figure input:focus-visible + img { outline: 3px solid var(--soft); }
/* A shadow at the side where there is more to see. */
.scroll { display: block; overflow-x: auto;
          background: linear-gradient(90deg, var(--page) 1rem, transparent 3rem) local,
                      linear-gradient(-90deg, var(--page) 1rem, transparent 3rem) local,
                      linear-gradient(90deg, #8888, transparent .6rem),
                      linear-gradient(-90deg, #8888, transparent .6rem); }
@media (max-width: 45rem) {
  figure::after { content: "tap to enlarge"; color: var(--soft); font-size: .8rem; }
}
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
         white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0;
            cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
/* Charts stand on white, as the figures do, for the sake of their colours. */
svg { background: #fff; border-radius: .5rem; --ink: #222; --line: #ddd; --page: #fff; }
i { display: inline-block; width: .75em; height: .75em; border-radius: 50%; }
@media (prefers-color-scheme: dark) { i { outline: 1.5px solid #fff; } }
tr.marked { background: var(--mark); }
"""

# For pages with tables of class "sortable": a click on a head sorts by it, a second click turns the
# order round. A cell sorts by its data-key, where it has one. Empty cells stay last.
SORT = """
function sortBy(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const up = head.getAttribute('aria-sort') !== 'ascending';
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const [p, q] = [key(a), key(b)];
    if (p === '' || q === '') return (p === '') - (q === '');
    const order = isNaN(p) || isNaN(q) ? p.localeCompare(q) : p - q;
    return up ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll('table.sortable'))
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = document.createElement('button');
    button.append(...cell.childNodes);
    button.addEventListener('click', () => sortBy(table, column));
    cell.append(button);
  });
"""
