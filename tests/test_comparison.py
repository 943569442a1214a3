"""The Pareto front, the constraint language, the tables, and a real browser on the page."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path

import pytest

from common.comparison.page import comparison_page
from common.comparison.results import (
    Candidate,
    Table,
    choose,
    describe_choice,
    markdown_table,
    parse_constraints,
    write_tables,
)
from common.engine.errors import UserError
from tests.conftest import lesson, seen_in_browser

pareto_front = lesson("07").pareto_front


def candidate(model: str, **known: object) -> Candidate:
    defaults = {
        "task": "test",
        "lesson": "01",
        "year": 2015,
        "input_px": 224,
        "params": 1,
        "macs": 1,
    }
    return Candidate(**{**defaults, "model": model, **known})


ZOO = [
    candidate("small", params=4_000_000, macs=300, latency_ms=10.0, top1=0.71),
    candidate("medium", params=5_000_000, macs=400, latency_ms=18.0, top1=0.77),
    candidate("large", params=25_000_000, macs=4_000, latency_ms=90.0, top1=0.80),
    candidate("wasteful", params=140_000_000, macs=15_000, latency_ms=400.0, top1=0.75),
    candidate("unmeasured", params=4_500_000, macs=350, top1=0.74),
    candidate("untrained", params=1_000_000, macs=100, latency_ms=1.0),
]


def names(candidates: list[Candidate]) -> list[str]:
    return [c.model for c in candidates]


# --------------------------------------------------------------------------------- the Pareto front


def test_front_of_the_zoo() -> None:
    assert names(pareto_front(ZOO, "macs")) == ["small", "unmeasured", "medium", "large"]
    assert names(pareto_front(ZOO, "latency_ms")) == ["small", "medium", "large"]


def test_front_is_what_the_definition_says() -> None:
    """Against the definition itself, on random points with ties."""
    draw = random.Random(0)
    for _ in range(200):
        points = [
            candidate(str(i), macs=draw.randint(1, 6), top1=draw.randint(1, 6) / 10)
            for i in range(8)
        ]

        def dominated(a: Candidate, others: list[Candidate] = points) -> bool:
            return any(
                b.macs <= a.macs and b.top1 >= a.top1 and (b.macs, b.top1) != (a.macs, a.top1)
                for b in others
            )

        assert set(names(pareto_front(points, "macs"))) == {
            p.model for p in points if not dominated(p)
        }


# ----------------------------------------------------------------------------------------- --choose


@pytest.mark.parametrize(
    ("text", "field", "limit", "inside", "outside"),
    [
        ("params<5M", "params", 5e6, 4_999_999, 5_000_000),
        ("macs<=1.5G", "macs", 1.5e9, 1_500_000_000, 1_500_000_001),
        ("latency<0.5s", "latency_ms", 500, 499.9, 500.0),
        ("size < 20 MB", "size_mb", 20, 19.9, 20.0),
        ("throughput>100/s", "images_per_second", 100, 100.1, 100.0),
        ("top1>=75%", "top1", 0.75, 0.75, 0.7499),
        ("top1>=0.75", "top1", 0.75, 0.75, 0.7499),
        ("PARAMS<5m", "params", 5e6, 4_999_999, 5_000_000),
        ("params<1e6,", "params", 1e6, 999_999, 1_000_000),
        ("px<=224", "input_px", 224, 224, 225),
    ],
)
def test_a_constraint(text: str, field: str, limit: float, inside: float, outside: float) -> None:
    [constraint] = parse_constraints(text)
    assert (constraint.field, constraint.limit) == (field, limit)
    assert constraint.met_by(candidate("x", **{field: inside}))
    assert not constraint.met_by(candidate("x", **{field: outside}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("param<5M", r"unknown word in --choose 'param' \(did you mean params\?\)"),
        ("params<5M,latency<20", "latency<20: latency needs a unit; units of latency: us, ms, s"),
        ("params<5ms", "unknown unit 'ms' of params; units of params: none, K, M, G"),
        ("top1>101%", "no accuracy is above 100%"),
        ("", "'' is no constraint"),
        ("params=5M", "'params=5M' is no constraint"),
        ("params<5M,,", "'' is no constraint"),
        ("params<-5M", "is no constraint"),
    ],
)
def test_a_wrong_constraint_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_constraints(text)


def test_choice_and_what_each_constraint_costs() -> None:
    choice = choose(ZOO, parse_constraints("params<5M,latency<20ms"))
    assert names(choice.ranked) == ["small"]
    by_params, by_latency = choice.costs
    assert by_params.without.model == "medium" and by_params.points == pytest.approx(0.06)
    assert by_latency.without.model == "unmeasured" and by_latency.points == pytest.approx(0.03)
    assert choice.together.without.model == "large" and choice.unmeasured == ["unmeasured"]
    assert choice.unscored == ["untrained"]
    told = describe_choice(choice)
    assert "params<5M: costs 6.00 points: without it medium" in told
    assert "9.00 points against large" in told
    assert "No accuracy is known, so left out: untrained" in told


def test_a_constraint_that_binds_nothing_costs_nothing() -> None:
    choice = choose(ZOO, parse_constraints("params<30M,latency<20ms"))
    assert names(choice.ranked) == ["medium", "small"]
    assert choice.costs[0].points == 0
    assert "params<30M: costs nothing" in describe_choice(choice)


def test_equal_accuracies_share_a_place() -> None:
    twin = candidate("twin", params=1, macs=500, latency_ms=1.0, top1=0.77)
    told = describe_choice(choose([*ZOO, twin], [])).splitlines()
    assert [line.split()[:2] for line in told[:4]] == [
        ["1.", "large"], ["2.", "medium"], ["2.", "twin"], ["4.", "wasteful"],
    ]  # fmt: skip


def test_nothing_fits() -> None:
    told = describe_choice(choose(ZOO, parse_constraints("params<1M,latency<20ms")))
    assert "Nothing fits." in told
    assert "params<1M: without it medium would fit" in told
    assert "latency<20ms: nothing would fit without it either" in told


# --------------------------------------------------------------------------------------- the tables


def test_tables_are_written(tmp_path: Path) -> None:
    write_tables(tmp_path, "Zoo", [Table("All", "made up", ZOO)])
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open(encoding="utf-8")))
    assert [row["model"] for row in rows] == names(ZOO)
    assert float(rows[1]["top1"]) == 0.77 and rows[4]["latency_ms"] == ""
    data = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert [Candidate(**c) for c in data["tables"][0]["candidates"]] == ZOO
    assert "| medium " in (tmp_path / "comparison.md").read_text(encoding="utf-8")


def test_markdown_shows_only_columns_that_say_something() -> None:
    table = markdown_table(ZOO)
    head, rule, *rows = table.splitlines()
    assert "latency ms" in head and "training s" not in head
    assert len(rows) == len(ZOO) and len({len(line) for line in (head, rule, *rows)}) == 1


# ----------------------------------------------------------------------------------------- the page


def test_page_needs_nothing_from_outside() -> None:
    tables, pictures = [Table("T", "</script>", ZOO)], {"a picture": b"\x89PNG\r\n\x1a\n"}
    page = comparison_page("A <b>", tables, pareto_front, pictures, "x < y")
    assert "A &lt;b&gt;" in page and "x &lt; y" in page
    assert (
        page.count("</script>") == 2
    )  # the data and the code, and nothing that a title smuggled in
    links = set(re.findall(r"https?://[^\s'\"<>)]+", page))
    assert links <= {"http://www.w3.org/2000/svg"}  # a name, which no browser fetches
    assert "default-src 'none'" in page


# Run in the page by the browser: a user's clicks and mouse, and what came of them, left in the
# document.
USER = """
<script>
addEventListener('load', () => {
  const section = document.getElementById('table-0');
  const heads = [...section.querySelectorAll('th button')];
  const click = name => heads.find(b => b.textContent === name).click();
  const order = () => [...section.querySelectorAll('tbody tr')].map(r => r.dataset.model);
  const seen = {start: order()};
  click('params'); seen.rising = order();
  click('params'); seen.falling = order();
  click('latency ms'); seen.emptyLast = order();
  click('model'); seen.byName = order();
  seen.points = [...section.querySelectorAll('circle')].map(c => c.dataset.model);

  const dot = section.querySelector('circle[data-model=medium]');
  dot.scrollIntoView({block: 'center'});
  const at = dot.getBoundingClientRect();
  const hit = document.elementFromPoint((at.left + at.right) / 2, (at.top + at.bottom) / 2);
  hit.dispatchEvent(new MouseEvent('mouseenter'));
  const tip = document.getElementById('tip');
  seen.tip = [getComputedStyle(tip).display, tip.textContent];
  seen.lit = [...section.querySelectorAll('tr.marked')].map(r => r.dataset.model);
  hit.dispatchEvent(new MouseEvent('mouseleave'));
  seen.after = getComputedStyle(tip).display;

  const select = section.querySelector('select');
  select.value = 'latency_ms';
  select.dispatchEvent(new Event('change'));
  seen.pointsByLatency = [...section.querySelectorAll('circle')].map(c => c.dataset.model);
  const circle = name => section.querySelector(`circle[data-model=${name}]`);
  const left = name => circle(name).getBoundingClientRect().left;
  seen.leftToRight = left('small') < left('medium') && left('medium') < left('wasteful');
  seen.frontCorners = section.querySelector('polyline.front').points.numberOfItems;
  const result = document.createElement('pre');
  result.id = 'seen';
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
});
</script>
</body>"""


def test_page_in_a_real_browser(tmp_path: Path) -> None:
    page = comparison_page("Zoo", [Table("All", "made up", ZOO)], pareto_front)
    seen = seen_in_browser(tmp_path, page.replace("</body>", USER))

    rising = sorted(ZOO, key=lambda c: c.params)
    assert seen["start"] == names(ZOO)
    assert seen["rising"] == names(rising) and seen["falling"] == names(rising[::-1])
    assert seen["emptyLast"][0] == "untrained" and seen["emptyLast"][-1] == "unmeasured"
    assert seen["byName"] == sorted(names(ZOO))
    assert seen["points"] == names([c for c in ZOO if c.top1 is not None])
    assert seen["tip"][0] == "block" and seen["tip"][1].startswith(
        "medium (2015): 77.00 %, 5M parameters"
    )
    assert seen["lit"] == ["medium"] and seen["after"] == "none"
    assert "unmeasured" not in seen["pointsByLatency"] and len(seen["pointsByLatency"]) == 4
    assert seen["leftToRight"]
    assert seen["frontCorners"] == len(pareto_front(ZOO, "latency_ms"))


NUMBERS = """
<script>
addEventListener('load', () => {
  const result = document.createElement('pre');
  const axis = [...document.querySelectorAll('svg text[text-anchor=middle]')];
  result.id = 'seen';
  result.textContent = JSON.stringify(axis.map(text => text.textContent));
  document.body.append(result);
});
</script>
</body>"""


def test_an_axis_of_nets_that_cost_the_same_has_numbers(tmp_path: Path) -> None:
    same = [candidate(f"n{i}", macs=297_000 + 3_000 * i, top1=0.9 - i / 50) for i in range(4)]
    page = comparison_page("Equals", [Table("All", "made up", same)], pareto_front)
    seen = seen_in_browser(tmp_path, page.replace("</body>", NUMBERS))
    assert {"290K", "300K", "310K"} <= set(seen), seen
