"""All runs on one page.

A table that sorts, the curves of all runs over each other, and a field that keeps the runs whose
line has all the words typed there. The page needs no network; it links to the runs' own reports.
"""

from __future__ import annotations

import csv
import json
import math
from html import escape
from pathlib import Path
from typing import Any

from common.engine.errors import UserError
from common.engine.files import write_atomically
from common.engine.report import PALETTE, SORT, page

# The head of a column: the key in result.json or config.json, and how its value reads.
COLUMNS: dict[str, tuple[str, str]] = {
    "lesson": ("lesson", "{:.2}"),
    "model": ("model", "{}"),
    "data": ("dataset", "{}"),
    "seed": ("seed", "{}"),
    "epochs": ("epochs", "{}"),
    "test top-1": ("test_top1", "{:.2%}"),
    "validation": ("val_top1", "{:.2%}"),
    "parameters": ("params", "{:,}"),
    "MACs": ("macs", "{:,}"),
    "training s": ("train_seconds", "{:,.0f}"),
    "images/s": ("images_per_second", "{:,.0f}"),
}
EXPERIMENTS = {
    "lesson": ("lesson", "{:.2}"),
    "experiment": ("experiment", "{}"),
    "data": ("dataset", "{}"),
    "seed": ("seed", "{}"),
    "verdict": ("verdict", "{}"),
}
CHARTS = {"val_top1": "validation accuracy by epoch", "train_loss": "training loss by epoch"}

Run = dict[str, Any]


def write_index(runs: Path) -> Path:
    """Write `runs`/index.html of the run folders `runs`/LESSON/NAME/, and return its path.

    Raises:
        UserError: there is none.
    """
    found = [run for file in sorted(runs.glob("*/*/config.json")) if (run := read_run(file.parent))]
    if not found:
        raise UserError(f"{runs} holds no run folders (LESSON/NAME/config.json)")
    found.sort(key=lambda run: run["when"], reverse=True)
    trained = [run for run in found if run["history"]]
    others = [run for run in found if not run["history"]]
    for i, run in enumerate(trained):
        run["color"] = PALETTE[i % len(PALETTE)]
    words = '<input id="words" placeholder="cifar10 resnet">'
    body = ["<h1>Runs</h1>", f"<label>only those with the words {words}</label>"]
    if trained:
        charts = "".join(_chart(trained, field, title) for field, title in CHARTS.items())
        body += [f'<div class="charts">{charts}</div>', _table(trained, COLUMNS, runs)]
    if others:
        body += ["<h2>Experiments and comparisons</h2>", _table(others, EXPERIMENTS, runs)]
    path = runs / "index.html"
    write_atomically(path, page("Runs", "\n".join(body), STYLE, SORT + SCRIPT))
    return path


def read_run(folder: Path) -> Run | None:
    """What the files of a run say, as far as they are there; None where they can't be read."""

    def read(name: str) -> str:
        return path.read_text(encoding="utf-8") if (path := folder / name).exists() else ""

    try:
        names = ("config", "result", "experiment")
        config, result, experiment = (json.loads(read(f"{name}.json") or "{}") for name in names)
        rows = csv.DictReader(read("history.csv").splitlines())
        history = [{field: float(row[field]) for field in CHARTS} for row in rows]
        verdict = experiment.get("verdict", [])
        run = {**config, **result, "verdict": "; ".join(verdict), "history": history}
        if run["dataset"] == "folder":
            run["dataset"] = Path(config["data_dir"]).name
        if not result:
            run["epochs"] = f"{len(history)} of {config['epochs']}"
        run["experiment"] = config["experiment"] or "comparison"
        return {**run, "folder": folder, "when": (folder / "config.json").stat().st_mtime}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _table(shown: list[Run], columns: dict[str, tuple[str, str]], runs: Path) -> str:
    heads = "".join(f"<th>{head}</th>" for head in columns)
    rows = "\n".join(_row(run, columns, runs) for run in shown)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr><th></th>{heads}<th>run</th></tr>'
        f"</thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _row(run: Run, columns: dict[str, tuple[str, str]], runs: Path) -> str:
    name = run["folder"].relative_to(runs).as_posix()
    dot = f'<i style="background:{run["color"]}"></i>' if "color" in run else ""
    cells = [f'<td data-key="{-run["when"]}">{dot}</td>']
    for field, form in columns.values():
        value = run.get(field)
        text = "" if value is None else str(value)
        kind = "text" if field == "verdict" else "number" if isinstance(value, int | float) else ""
        key = escape(text, quote=True)
        if text and (kind == "number" or field == "lesson"):
            text = form.format(value)
        cells.append(f'<td class="{kind}" data-key="{key}">{escape(text)}</td>')
    link = escape(run["folder"].name)
    if (run["folder"] / "report.html").exists():
        link = f'<a href="{escape(name, quote=True)}/report.html">{link}</a>'
    return f'<tr data-run="{escape(name, quote=True)}">{"".join(cells)}<td>{link}</td></tr>'


def _chart(trained: list[Run], field: str, title: str) -> str:
    """The runs' curves as SVG, 480 x 300."""
    from matplotlib.ticker import MaxNLocator

    left, right, top, bottom = 52, 470, 34, 270
    curves = [[record[field] for record in run["history"]] for run in trained]
    known = [value for curve in curves for value in curve if math.isfinite(value)] or [0.0]
    longest, low, high = max(map(len, curves)), min(known), max(known)
    round_numbers = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values
    ticks = round_numbers(low, high if high > low else low + (abs(low) or 1))
    epochs = round_numbers(1, max(2, longest))

    def x(epoch: float) -> float:
        return left + (right - left) * (epoch - 1) / max(1, longest - 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    factor, unit = (100, "%") if field.endswith("top1") else (1, "")
    parts = [f'<text x="8" y="18">{title}</text>']
    for value in ticks:
        label = f"{value * factor:.6g}{unit}"
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" class="end">{label}</text>'
        )
    for epoch in epochs:
        if 1 <= epoch <= longest and epoch == int(epoch):
            parts.append(
                f'<text x="{x(epoch):.1f}" y="{bottom + 22}" class="mid">{epoch:.0f}</text>'
            )
    for run, curve in zip(trained, curves):
        points = [f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(curve, 1) if math.isfinite(v)]
        points *= 1 + (len(points) == 1)  # a line without length: its round ends are a dot
        name = escape("/".join(run["folder"].parts[-2:]), quote=True)
        parts.append(
            f'<polyline data-run="{name}" points="{" ".join(points)}" stroke="{run["color"]}">'
            f"<title>{name}</title></polyline>"
        )
    return f'<svg viewBox="0 0 480 300" role="img" aria-label="{title}">{"".join(parts)}</svg>'


STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
          gap: 1rem; margin: 1rem 0; }
svg text { fill: var(--ink); font-size: 13px; } svg .end { text-anchor: end; }
svg .mid { text-anchor: middle; } svg line { stroke: var(--line); }
main { max-width: 90rem; }
polyline { fill: none; stroke-width: 2.5; stroke-linecap: round; stroke-linejoin: round; }
svg.marking polyline:not(.marked) { opacity: .15; }
polyline.marked { stroke-width: 4; }
td { vertical-align: top; } .text { white-space: normal; min-width: 20rem; }
input { font: inherit; padding: .2rem .5rem; color: inherit; background: var(--card);
        border: 1px solid var(--line); border-radius: .3rem; }
[hidden] { display: none; }
"""

SCRIPT = """
const rows = [...document.querySelectorAll('tr[data-run]')];
const lines = [...document.querySelectorAll('polyline')];

// Under the mouse, a run lights up in table and charts alike.
for (const node of [...rows, ...lines]) {
  const mark = on => {
    for (const chart of document.querySelectorAll('svg')) chart.classList.toggle('marking', on);
    for (const other of [...rows, ...lines])
      other.classList.toggle('marked', on && other.dataset.run === node.dataset.run);
  };
  node.addEventListener('mouseenter', () => mark(true));
  node.addEventListener('mouseleave', () => mark(false));
}

document.getElementById('words').addEventListener('input', event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  const gone = new Set();
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    if (row.hidden) gone.add(row.dataset.run);
  }
  for (const line of lines) line.style.display = gone.has(line.dataset.run) ? 'none' : '';
});
"""
