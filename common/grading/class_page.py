"""class.html: what the marks of a class say, for its teacher. It shows names.

Beside grades.csv, from grades.csv: how the totals spread, which exercises were hard and which tell
the strong from the weak, which mistakes were made and by whom, and which submissions resemble each
other. A resemblance is evidence to look at and never a verdict.
"""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from itertools import combinations
from statistics import correlation, mean, median
from typing import TYPE_CHECKING

from common.engine.report import page
from common.grading.exercises import exercises, lesson_path
from common.grading.holes import take_out

if TYPE_CHECKING:
    from common.grade import Grade
    from common.grading.marking import Submission

ALIKE = 0.6  # share of common code from which a pair is shown; see `alike`
SHINGLE = 7  # tokens
STYLE = """
.bar { background: #005C9F; height: 1.1em; display: inline-block; vertical-align: middle; }
td pre { margin: 0; white-space: pre-wrap; font-size: .85em; }
mark { background: #FFE08A; } td { vertical-align: top; }
"""


def class_page(grades: Sequence[Grade], submissions: Iterable[Submission]) -> str:
    """The whole page, which needs no network.

    Args:
        grades: the lines of grades.csv, of all students and exercises.
        submissions: what they handed in, to be compared.
    """
    totals: dict[str, float] = {}
    for grade in grades:
        totals[grade.student] = totals.get(grade.student, 0.0) + grade.score
    most = sum({g.exercise: g.max_score for g in grades}.values())
    lessons = sorted({g.lesson for g in grades})
    body = [
        f"<h1>{len(totals)} students, lessons {', '.join(lessons)}</h1>",
        '<p class="note">For the teacher: it shows names.</p>',
        f"<p>Mean {mean(totals.values()):.1f} and median {median(totals.values()):.1f} of "
        f"{most:g} points.</p>",
        "<h2>Totals</h2>",
        _histogram(totals, most),
        "<h2>Exercises</h2>",
        _table(
            ("exercise", "", "mean", "full", "none", "separates", "seconds"),
            _exercise_rows(grades, totals),
        ),
        "<p>An exercise separates if who gets its points has more of the others too: the "
        "correlation of its points with the rest of the total. Below 0.2 it tells the strong from "
        "the weak hardly; where all have the same, nothing.</p>",
        "<h2>Checks that were lost</h2>",
        _table(("exercise", "check", "students"), _check_rows(grades)),
        "<h2>Mistakes</h2>",
        _table(("exercise", "mistake", "students", "who"), mistakes(grades)),
        "<h2>Submissions that resemble each other</h2>",
        _pairs(submissions, lessons),
    ]
    return page("The class", "\n".join(body), STYLE)


def _histogram(totals: Mapping[str, float], most: float) -> str:
    """Ten bins of a tenth of the points each; the last holds the full marks."""
    bins = Counter(min(9, int(10 * total / most)) if most else 0 for total in totals.values())
    rows = [
        (
            f"{most * i / 10:g} to {most * (i + 1) / 10:g}",
            str(bins[i]),
            f'<span class="bar" style="width:{bins[i] / max(bins.values()) * 16:.1f}em"></span>',
        )
        for i in range(10)
    ]
    return _table(("points", "students", ""), rows, raw=2)


def _exercise_rows(grades: Sequence[Grade], totals: Mapping[str, float]) -> list[tuple[str, ...]]:
    rows = []
    for number in dict.fromkeys(g.exercise for g in grades):
        group = [g for g in grades if g.exercise == number]
        scores = [g.score for g in group]
        rest = [totals[g.student] - g.score for g in group]
        told = "all alike"
        if len(set(scores)) > 1 and len(set(rest)) > 1:
            r = correlation(scores, rest)
            told = f"{'yes' if r >= 0.4 else 'somewhat' if r >= 0.2 else 'hardly'} ({r:+.2f})"
        rows.append(
            (
                number, group[0].title, f"{mean(scores):.1f} of {group[0].max_score:g}",
                str(sum(g.score >= g.max_score for g in group)),
                str(sum(s <= 0 for s in scores)), told,
                f"{median(g.seconds for g in group):.1f}",
            )
        )  # fmt: skip
    return rows


def _check_rows(grades: Sequence[Grade]) -> list[tuple[str, ...]]:
    lost = Counter((g.exercise, check) for g in grades for check in g.failed.split())
    return [(number, check, str(count)) for (number, check), count in sorted(lost.items())]


def mistakes(grades: Sequence[Grade]) -> list[tuple[str, ...]]:
    """(exercise, mistake, "3 of 4", who), the commonest first. A named mistake counts as one,
    whatever the numbers around it; another message counts without its numbers.
    """
    made: dict[tuple[str, str], list[str]] = {}
    for grade in grades:
        found = [_mistake(message) for message in grade.message.split(" | ") if message]
        for what in dict.fromkeys(found):
            made.setdefault((grade.exercise, what), []).append(grade.student)
    students = len({g.student for g in grades})
    return [
        (number, what, f"{len(who)} of {students}", ", ".join(sorted(who)))
        for (number, what), who in sorted(made.items(), key=lambda item: -len(item[1]))
    ]


def _mistake(message: str) -> str:
    """What stays of a message: the mistake's name, or the sentence without its numbers."""
    if message.startswith("not done yet"):
        return "not done yet"
    if named := re.match(r".*(?:likely: |it would be right )(.+)", message, re.DOTALL):
        return named[1].strip()
    return re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", message)[:160]


# ------------------------------------------------------------------------ what resembles each other


def _own(source: str, lesson: str) -> dict[str, str]:
    """The source of each part that an exercise asks for, by its name."""
    wanted = {p.split(".")[0] for e in exercises(lesson).values() for p in e.parts}
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    kinds = ast.ClassDef, ast.FunctionDef
    nodes = [n for n in tree.body if isinstance(n, kinds) and n.name in wanted]
    return {node.name: ast.get_source_segment(source, node) or "" for node in nodes}


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


def alike(one: set, two: set, given: set) -> float:
    """Of the code in either that was not given, the share that is in both."""
    one, two = one - given, two - given
    return len(one & two) / len(one | two) if one and two else 0.0


def _pairs(submissions: Iterable[Submission], lessons: Sequence[str]) -> str:
    """The pairs above ALIKE, the most alike first, part by part beside each other."""
    shown = []
    for lesson in lessons:
        whole = lesson_path(lesson).read_text(encoding="utf-8")
        given = shingles(take_out(whole, exercises(lesson).values()))
        parts = {}
        for submission in submissions:
            try:
                source = submission.source(lesson)[1].decode("utf-8", "replace")
            except (ValueError, OSError):
                continue
            parts[submission.name] = _own(source, lesson)
        marks = {name: shingles("\n".join(own.values())) for name, own in parts.items()}
        if len(marks) >= 8:  # what half of a class wrote is what anybody writes
            common = Counter(s for mark in marks.values() for s in mark)
            given = given | {s for s, n in common.items() if n > len(marks) / 2}
        for a, b in combinations(marks, 2):
            if (share := alike(marks[a], marks[b], given)) >= ALIKE:
                shown.append((share, lesson, a, b, parts[a], parts[b]))
    intro = (
        f"<p>Compared are runs of {SHINGLE} tokens, without the starter's code, comments and "
        "layout, and in a class of eight or more without what half of it wrote. Shown are pairs "
        f"that share {ALIKE:.0%} or more. Short blocks have one natural solution: of the course's "
        "solutions and independently written right ones no lesson of nine shares more than 32%, "
        "but single exercises of a few lines up to 65%. So a pair is a reason to look and to ask, "
        "and never a proof.</p>"
    )
    if not shown:
        return intro + "<p>There is no such pair.</p>"
    text = [intro]
    for share, lesson, a, b, first, second in sorted(shown, key=lambda s: -s[0])[:50]:
        text.append(f"<h3>{escape(a)} and {escape(b)}, lesson {lesson}: {share:.0%}</h3>")
        rows = [_beside(first[name], second[name]) for name in first if name in second]
        text.append(_table((a, b), rows, raw=0))
    return "\n".join(text)


def _beside(one: str, two: str) -> tuple[str, str]:
    """Two pieces of code as HTML, the lines that both have marked."""
    lines = [one.splitlines(), two.splitlines()]
    matcher = SequenceMatcher(None, *([line.strip() for line in text] for text in lines), False)
    same: tuple[set[int], set[int]] = set(), set()
    for block in matcher.get_matching_blocks():
        same[0].update(range(block.a, block.a + block.size))
        same[1].update(range(block.b, block.b + block.size))
    cells = []
    for text, marked in zip(lines, same):
        shown = (
            f"<mark>{escape(line)}</mark>" if i in marked and line.strip() else escape(line)
            for i, line in enumerate(text)
        )
        cells.append("<pre>" + "\n".join(shown) + "</pre>")
    return cells[0], cells[1]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], raw: int | None = None) -> str:
    """Args: raw: from this column on the cells are HTML already."""
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    raw = len(heads) if raw is None else raw
    lines = [
        "".join(f"<td>{c if i >= raw else escape(c)}</td>" for i, c in enumerate(row))
        for row in rows
    ]
    cells = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{cells}</tbody>' + (
        "</table></div>"
    )
