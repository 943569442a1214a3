"""A comparison as one page: tables that sort, points that name themselves under the mouse, and
nothing from outside.

The tables are plain HTML, so the page says everything without JavaScript too; the script adds
sorting and the chart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from common.comparison.results import Candidate, Front, Table, filled_columns, percent, si
from common.engine.report import PALETTE, SORT, figure_html, page

# What a chart can have on its x axis: field -> words. Costs; the y axis is always top-1.
AXES = {
    "macs": "multiply-adds per image",
    "params": "parameters",
    "latency_ms": "latency for one image, ms",
    "memory_mb": "peak memory, MB",
    "size_mb": "file size, MB",
}


def comparison_page(
    title: str,
    tables: Sequence[Table],
    front_of: Front,
    figures: Mapping[str, bytes] | None = None,
    text: str = "",
) -> str:
    """The whole page: plain text on top, such as the verdict; a chart and a table of each of the
    tables, since accuracies of two tasks can't be compared; figures (caption -> PNG).
    """
    data = json.dumps([_chart_data(table.candidates, front_of) for table in tables])
    data = data.replace("<", "\\u003c")  # no '<' of its own can close the script element
    lessons = sorted({c.lesson for table in tables for c in table.candidates})
    legend = "".join(
        f'<span><i style="background:{_color(lesson)}"></i>lesson {lesson}</span>'
        for lesson in lessons
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<pre>{escape(text)}</pre>" if text else "",
        f'<p class="legend">{legend}</p>',
        *(_section(i, table) for i, table in enumerate(tables)),
        *(figure_html(png, caption) for caption, png in (figures or {}).items()),
        '<div id="tip" role="status"></div>',
        f'<script type="application/json" id="data">{data}</script>',
    ]
    return page(title, "\n".join(body), STYLE, SORT + SCRIPT)


def _section(number: int, table: Table) -> str:
    columns = filled_columns(table.candidates)
    heads = "".join(f'<th scope="col">{escape(column.head)}</th>' for column in columns)
    rows = []
    for candidate in table.candidates:
        cells = ""
        for column in columns:
            key = getattr(candidate, column.field)
            key = "" if key is None else escape(str(key))
            note = candidate.thop_note if column.field == "thop_macs" else ""
            tip = f' title="{escape(note)}"' if note else ""
            cells += f'<td data-key="{key}"{tip}>{escape(column.cell(candidate))}</td>'
        rows.append(f'<tr data-model="{escape(candidate.model)}">{cells}</tr>')
    return f"""<section id="table-{number}">
<h2>{escape(table.title)}</h2>
<p>{escape(table.note)}</p>
<div class="chart"></div>
<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead>
<tbody>
{chr(10).join(rows)}
</tbody></table></div>
</section>"""


def _chart_data(candidates: Sequence[Candidate], front_of: Front) -> dict:
    shown = [c for c in candidates if c.top1 is not None]
    axes = {k: words for k, words in AXES.items() if any(getattr(c, k) for c in shown)}
    points = []
    for c in shown:
        year = f" ({c.year})" if c.year else ""
        about = f"{c.model}{year}: {percent(c.top1)}, {si(c.params)} parameters, {si(c.macs)} MACs"
        if c.latency_ms is not None:
            about += f", {c.latency_ms:.2f} ms"
        costs = {k: getattr(c, k) for k in axes}
        color = _color(c.lesson)
        points.append(
            {"model": c.model, "top1": c.top1, "color": color, "about": about, "x": costs}
        )
    fronts = {k: [c.model for c in front_of(shown, k)] for k in axes}
    return {"axes": axes, "points": points, "fronts": fronts}


def _color(lesson: str) -> str:
    return PALETTE[(int(lesson) - 1) % len(PALETTE)]


STYLE = """
pre { white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: 1rem; }
.legend span { margin-right: 1.2rem; white-space: nowrap; }
.legend i { margin-right: .4em; }
td, th { text-align: right; padding: .3rem .6rem; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font-size: 13px; } svg .grid { stroke: var(--line); }
svg .front { fill: none; stroke: var(--ink); stroke-dasharray: 5 4; opacity: .6; }
svg circle { stroke: var(--page); stroke-width: 1.5; cursor: pointer; }
svg circle.marked { stroke: var(--ink); }
svg circle:focus { outline: none; stroke: var(--ink); }
#tip { position: fixed; display: none; pointer-events: none; padding: .3rem .6rem;
  border-radius: .3rem; background: var(--ink); color: var(--page); font-size: .87rem;
  max-width: 24rem; z-index: 1; }
"""

SCRIPT = """
const tip = document.getElementById('tip');
const charts = JSON.parse(document.getElementById('data').textContent);

function svg(parent, name, attributes, text) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  parent.append(node);
  return node;
}

// Under the mouse, or under the keyboard's focus, a model lights up in chart and table alike; a
// point names itself, too.
function watch(node, section, text) {
  const turn = on => {
    for (const other of section.querySelectorAll('[data-model]'))
      other.classList.toggle('marked', on && other.dataset.model === node.dataset.model);
    if (!text) return;
    tip.textContent = text;
    tip.style.display = on ? 'block' : 'none';
    const place = node.getBoundingClientRect();
    tip.style.left = Math.min(place.right + 14, innerWidth - tip.offsetWidth - 8) + 'px';
    tip.style.top = Math.max(8, place.top - tip.offsetHeight - 10) + 'px';
  };
  for (const event of ['mouseenter', 'focus']) node.addEventListener(event, () => turn(true));
  for (const event of ['mouseleave', 'blur']) node.addEventListener(event, () => turn(false));
}

function si(value) {
  for (const [factor, prefix] of [[1e9, 'G'], [1e6, 'M'], [1e3, 'K']])
    if (value >= factor) return +(value / factor).toPrecision(3) + prefix;
  return String(+value.toPrecision(3));
}

function draw(section, chart, axis) {
  const box = section.querySelector('.plot');
  box.replaceChildren();
  const points = chart.points.filter(p => p.x[axis] > 0);
  // As wide as there is room, so that the text has one size on a phone too.
  const width = Math.max(300, Math.min(960, box.clientWidth)), height = 240 + width / 5;
  const [left, right, top, bottom] = [64, 20, 16, 52];
  const root = svg(box, 'svg', {viewBox: `0 0 ${width} ${height}`, role: 'group',
    'aria-label': 'top-1 accuracy by ' + chart.axes[axis]});
  const logs = points.map(p => Math.log10(p.x[axis])), tops = points.map(p => 100 * p.top1);
  const range = (values, least) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const more = Math.max(0.06 * (high - low), least);
    return [low - more, high + more];
  };
  const [x0, x1] = range(logs, 0.05), [y0, y1] = range(tops, 0.5);
  const px = value => left + (Math.log10(value) - x0) / (x1 - x0) * (width - left - right);
  const py = percent => height - bottom - (percent - y0) / (y1 - y0) * (height - top - bottom);

  const [low, high] = [10 ** x0, 10 ** x1];
  let marks = [];
  for (let decade = Math.floor(x0); decade <= x1; decade++)
    marks.push(...[1, 2, 5].map(step => step * 10 ** decade));
  marks = marks.filter(value => low <= value && value <= high);
  if (marks.length < 2) {  // all cost about the same
    const step = 10 ** Math.floor(Math.log10((high - low) / 2)), first = Math.ceil(low / step);
    marks = Array.from({length: Math.floor(high / step) - first + 1}, (_, i) => (first + i) * step);
  }
  let last = -Infinity;
  for (const value of marks) {
    const x = px(value);
    if (x < last + 44) continue;
    last = x;
    svg(root, 'line', {class: 'grid', x1: x, x2: x, y1: top, y2: height - bottom});
    svg(root, 'text', {x, y: height - bottom + 20, 'text-anchor': 'middle'}, si(value));
  }
  const unit = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20].find(u => (y1 - y0) / u <= 8) || 25;
  for (let i = Math.ceil(y0 / unit); i * unit <= y1; i++) {
    const y = py(i * unit);
    svg(root, 'line', {class: 'grid', x1: left, x2: width - right, y1: y, y2: y});
    const label = +(i * unit).toFixed(1) + ' %';
    svg(root, 'text', {x: left - 8, y: y + 4, 'text-anchor': 'end'}, label);
  }
  svg(root, 'text', {x: (left + width - right) / 2, y: height - 8, 'text-anchor': 'middle'},
    chart.axes[axis] + ' (log scale)');

  const at = p => [px(p.x[axis]), py(100 * p.top1)];
  const front = chart.fronts[axis].map(name => points.find(p => p.model === name)).filter(Boolean);
  svg(root, 'polyline', {class: 'front', points: front.map(at).join(' ')});
  for (const p of points) {
    const [cx, cy] = at(p), r = front.includes(p) ? 8 : 6;
    const dot = svg(root, 'circle',
      {cx, cy, r, fill: p.color, tabindex: 0, role: 'img', 'aria-label': p.about});
    dot.dataset.model = p.model;
    watch(dot, section, p.about);
  }
}

charts.forEach((chart, i) => {
  const section = document.getElementById('table-' + i);
  for (const row of section.querySelectorAll('tbody tr')) watch(row, section);
  if (!chart.points.length) return;
  section.querySelector('.chart').innerHTML = '<label>Top-1 accuracy against <select></select>' +
    ' (dashed: the Pareto front)</label><div class="plot"></div>';
  const select = section.querySelector('select');
  for (const [field, words] of Object.entries(chart.axes)) select.add(new Option(words, field));
  for (const [node, event] of [[select, 'change'], [window, 'resize']])
    node.addEventListener(event, () => draw(section, chart, select.value));
  draw(section, chart, select.value);
});
"""
