"""class.html, beside grades.csv and made from it, for the teacher: it shows names.

How the totals spread, which exercises were hard and which tell the strong from the weak, which
mistakes were made and by whom, and which submissions resemble each other.
"""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import partial
from html import escape
from itertools import combinations
from statistics import correlation, mean, median
from typing import TYPE_CHECKING

from common.engine.report import SORT, page
from common.grading.exercises import exercises, lesson_path, worth
from common.grading.holes import take_out
from common.grading.platforms import grouped, points_of

if TYPE_CHECKING:
    from common.grade import Grade
    from common.grading.marking import Submission

ALIKE = 0.6  # share of common code from which a pair is shown; see `alike`
SHINGLE = 7  # tokens
LINES = 400  # of a part's code that are shown
STYLE = """
.bar { background: #005C9F; height: 1.1em; display: inline-block; vertical-align: middle;
       width: calc(var(--share) * min(16rem, 40vw)); }
.text { white-space: normal; min-width: 11rem; }
td { vertical-align: top; }
.lost { background: color-mix(in srgb, #D96C0B var(--share), transparent); padding: 0 .4em; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
          gap: 1rem; }
pre { margin: 0; white-space: pre-wrap; font-size: .85em; }
mark { background: var(--mark); color: inherit; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
"""
EXERCISES = ("exercise", "", "mean", "full", "none", "separates", "seconds", "at most")


class Html(str):
    """Text that is HTML already; any other is escaped."""


def class_page(grades: Sequence[Grade], submissions: Sequence[Submission]) -> str:
    """The whole page, which needs no network: of grades.csv, and of what was handed in."""
    totals = {name: points_of(group)[0] for name, group in grouped(grades, "student").items()}
    most = sum({g.exercise: g.max_score for g in grades}.values())
    lessons = sorted({g.lesson for g in grades})
    plural = "s" if len(lessons) > 1 else ""
    told, spent = totals.values(), sum(g.seconds for g in grades)
    body = f"""<h1>{len(totals)} students, lesson{plural} {", ".join(lessons)}</h1>
<p class="note">For the instructor alone: this page shows names and code.</p>
<p>Mean {mean(told):.1f} and median {median(told):.1f} of {most:g} points; \
marked in {spent:.0f} s of work.</p>
{_histogram(totals, most)}
<h2>Exercises</h2>
{_table(EXERCISES, _exercise_rows(grades, totals))}
<p class="note">Full and none: how many have all of the points, and no point. An exercise \
separates if those who have its points have more of the other points too; the number is \
the correlation of its points with the rest of the total. Below 0.2 it hardly tells the \
strong from the weak, and where all have the same it tells nothing. Seconds: what it took \
to mark, in the middle and at most.</p>
<h2>Mistakes</h2>
{_table(("students", "mistake", "exercise", "who"), mistakes(grades))}
<h2>Checks that were lost</h2>
<p class="note">How many students lost points by it, and in small figures its points.</p>\
{_checks(grades)}
<details><summary>Points of each student</summary>{_points(grades, totals)}</details>
<h2>Submissions that resemble each other</h2>
{_pairs(submissions, lessons)}"""
    return page("The class", body, STYLE, SORT)


def _histogram(totals: Mapping[str, float], most: float) -> str:
    """Ten bins of a tenth of the points each; the last holds the full marks."""
    bins = Counter(min(9, int(10 * total / most)) for total in totals.values())
    rows = [
        (
            f"{most * i / 10:g} to {most * (i + 1) / 10:g}",
            str(bins[i]),
            Html(f'<span class="bar" style="--share:{bins[i] / max(bins.values()):.3f}"></span>'),
        )
        for i in range(10)
    ]
    return _table(("points", "students", ""), rows)


def _exercise_rows(grades: Sequence[Grade], totals: Mapping[str, float]) -> list[tuple[str, ...]]:
    rows = []
    for number, group in grouped(grades, "exercise").items():
        scores, seconds = [g.score for g in group], [g.seconds for g in group]
        rest = [totals[g.student] - g.score for g in group]
        told = "all alike"
        if len(set(scores)) > 1 and len(set(rest)) > 1:
            r = correlation(scores, rest)
            told = f"{'yes' if r >= 0.4 else 'somewhat' if r >= 0.2 else 'hardly'} ({r:+.2f})"
        rows.append(
            (
                number, group[0].title, f"{mean(scores):.1f} of {group[0].max_score:g}",
                str(sum(g.score >= g.max_score for g in group)), str(sum(s <= 0 for s in scores)),
                told, f"{median(seconds):.1f}", f"{max(seconds):.1f}",
            )
        )  # fmt: skip
    return rows


def _checks(grades: Sequence[Grade]) -> str:
    """For each exercise and check its points and how many lost some of them; darker is more."""
    points = {(r.exercise, r.check): r.points for r in worth(tuple({g.lesson for g in grades}))}
    lost = Counter((g.exercise, check) for g in grades for check in g.failed.split())
    heads = list(dict.fromkeys(check for _, check in points))
    rows = []
    for number, group in grouped(grades, "exercise").items():
        cells = []
        for check in heads:
            count = lost[number, check]
            share = f"--share:{count / len(group):.0%}"
            told = f'<span class="lost" style="{share}">{count}</span>'
            at_most = points.get((number, check))
            cells.append(Html(f"{told} <small>{at_most:g}</small>") if at_most else "")
        rows.append((number, *cells))
    return _table(("exercise", *heads), rows)


def _points(grades: Sequence[Grade], totals: Mapping[str, float]) -> str:
    """Points by student and exercise; a click on a head sorts."""
    numbers = list(grouped(grades, "exercise"))
    score = {(g.student, g.exercise): g.score for g in grades}
    rows = [
        (name, f"{total:g}", *(f"{score.get((name, number), 0):g}" for number in numbers))
        for name, total in totals.items()
    ]
    return _table(("student", "total", *numbers), rows, sortable=True)


def mistakes(grades: Sequence[Grade]) -> list[tuple[str, ...]]:
    """("3 of 4", mistake, exercises, who), the commonest first. A named mistake counts as one,
    whatever the numbers around it; another message counts without its numbers. What the same
    students did in several exercises is one line.
    """
    made: dict[tuple[str, str], list[str]] = defaultdict(list)
    for grade in grades:
        for what in dict.fromkeys(map(_mistake, filter(None, grade.message.split(" | ")))):
            made[grade.exercise, what].append(grade.student)
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (number, what), who in made.items():
        merged[what, tuple(sorted(who))].append(number)
    students, every = len({g.student for g in grades}), len({g.exercise for g in grades})
    rows = [
        (what, who, "all" if 1 < every == len(numbers) else ", ".join(numbers))
        for (what, who), numbers in merged.items()
    ]
    rows.sort(key=lambda row: -len(row[1]))
    return [(f"{len(who)} of {students}", what, where, ", ".join(who)) for what, who, where in rows]


def _mistake(message: str) -> str:
    """What stays of a message: the mistake's name, or the sentence without its numbers."""
    if message.startswith("not done yet"):
        return "not done yet"
    if named := re.match(r".*(?:likely: |it would be right )(.+)", message, re.DOTALL):
        return named[1].strip()
    return re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", message)[:160]


# ------------------------------------------------------------------------ what resembles each other


def own(source: str, lesson: str) -> dict[str, str]:
    """The source of each part that an exercise asks for, by its name."""
    wanted = {p.split(".")[0] for e in exercises(lesson).values() for p in e.parts}
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    nodes = [n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    return {n.name: ast.get_source_segment(source, n) or "" for n in nodes if n.name in wanted}


def shingles(source: str) -> set[tuple[str, ...]]:
    """Runs of SHINGLE tokens, without comments, docstrings and layout. Names that an author chooses
    (of variables and of the attributes of self) count as one, so that renaming hides nothing.
    """
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens: list[str] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            text = token.string
            if token.type in skip or text.startswith(('"""', "'''")):
                continue
            if token.type == tokenize.NAME and not keyword.iskeyword(text):
                of_self = tokens[-2:] == ["self", "."]
                free = tokens[-1:] != ["."] and text not in ("self", "nn", "F", "torch", "super")
                text = "NAME" if of_self or (free and text.islower()) else text
            tokens.append(text)
    except (tokenize.TokenError, SyntaxError):
        return set()
    return set(zip(*(tokens[i:] for i in range(SHINGLE))))


def alike(one: set, two: set) -> float:
    """Of the code in either the share that is in both."""
    return len(one & two) / len(one | two) if one and two else 0.0


def _pairs(submissions: Sequence[Submission], lessons: Sequence[str]) -> str:
    """The pairs above ALIKE, the most alike first, part by part beside each other; and who hands in
    the course's own text.
    """
    shown: list[tuple[float, Callable[[], str]]] = []
    copied = []
    for lesson in lessons:
        whole = lesson_path(lesson).read_text(encoding="utf-8")
        starter = take_out(whole, list(exercises(lesson).values()))
        given, course = shingles(starter), {n: shingles(t) for n, t in own(whole, lesson).items()}
        parts: dict[str, dict[str, str]] = {}
        verbatim: dict[str, list[str]] = defaultdict(list)
        for submission in submissions:
            try:
                data = submission.source(lesson, only=len(lessons) == 1)[1]
                source = data.decode("utf-8-sig", "replace")
            except (ValueError, OSError):
                continue
            # The course's own text says nothing of two students: the assignment may have left it.
            parts[submission.name] = texts = own(source, lesson)
            for part in [n for n, text in texts.items() if shingles(text) == course[n]]:
                del texts[part]
                verbatim[part].append(submission.name)
        copied += [
            (f"{lesson} {part}", ", ".join(who))
            for part, who in verbatim.items()
            if 2 * len(who) <= len(parts)  # of more it was part of the assignment
        ]
        marks = {name: shingles("\n".join(texts.values())) for name, texts in parts.items()}
        if len(marks) >= 8:  # what half of a class wrote is what anybody writes
            common = Counter(s for mark in marks.values() for s in mark)
            given = given | {s for s, n in common.items() if n > len(marks) / 2}
        lines = {line.strip() for line in starter.splitlines()}
        for a, b in combinations(marks, 2):
            if (share := alike(marks[a] - given, marks[b] - given)) >= ALIKE:
                head = f"{a} and {b}, lesson {lesson}: {share:.0%}"
                shown.append((share, partial(_pair, head, parts[a], parts[b], given, lines)))
    text = [
        f'<p class="note">Compared are runs of {SHINGLE} tokens, without the starter\'s code, '
        "comments, layout and the names of variables, without parts that are the course's own "
        "text, and in a class of eight or more without what half of it wrote. Shown are pairs that "
        f"share {ALIKE:.0%} or more of one lesson. Short blocks have one natural solution. Of the "
        "course's solutions and other right ones, written independently, no lesson of nine shares "
        "more than a third, but single parts share up to 52%. Nine pairs are few: they can't rule "
        "out that one honest pair in four is shown. So a pair is a reason to look and to ask, and "
        "never a proof.</p>"
    ]
    shown.sort(key=lambda pair: -pair[0])
    text += [show() for _, show in shown[:50]] or ["<p>There is no such pair.</p>"]
    if copied:
        text += [
            "<h3>The course's own text, but for names and comments</h3>",
            _table(("part", "handed in by"), copied),
        ]
    return "\n".join(text)


def _pair(
    head: str, one: Mapping[str, str], two: Mapping[str, str], given: set, lines: set[str]
) -> str:
    """The parts that both have, beside each other."""
    inside = []
    for name in [name for name in one if name in two]:
        share = alike(shingles(one[name]) - given, shingles(two[name]) - given)
        beside = _beside(one[name], two[name], lines)
        inside.append(f'<h3>{escape(name)}: {share:.0%}</h3><div class="beside">{beside}</div>')
    return f"<details><summary>{escape(head)}</summary>{''.join(inside)}</details>"


def _beside(one: str, two: str, given: set[str]) -> str:
    """Two pieces of code as HTML; lines that both have, and that were not given, are marked."""
    texts = [text.splitlines()[:LINES] for text in (one, two)]
    matcher = SequenceMatcher(None, *([line.strip() for line in text] for text in texts), False)
    same: tuple[set[int], set[int]] = set(), set()
    for i, j, size in matcher.get_matching_blocks():
        same[0].update(range(i, i + size))
        same[1].update(range(j, j + size))
    cells = []
    for text, marked in zip(texts, same):
        lines = [escape(line) for line in text]
        for i in marked:
            if text[i].strip() not in given:
                lines[i] = f"<mark>{lines[i]}</mark>"
        cells.append("<pre>" + "\n".join(lines) + "</pre>")
    return "".join(cells)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], sortable: bool = False) -> str:
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    cells = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n<tbody>{cells}</tbody>'
        "</table></div>"
    )


def _cell(text: str) -> str:
    if isinstance(text, Html):
        return f"<td>{text}</td>"
    wraps = ' class="text"' if len(text) > 28 else ""
    return f"<td{wraps}>{escape(text)}</td>"
