"""The page of a class: its numbers by hand, its names escaped, and what its comparison can tell."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from common.grade import Grade
from common.grading.class_page import ALIKE, alike, class_page, mistakes, own, shingles
from common.grading.exercises import exercises, lesson_path, manifests
from common.grading.holes import put_in, take_out
from common.grading.marking import Submission
from tests.grading_solutions import SOLUTIONS

LIKELY = "values off by up to {}; likely: the last ReLU is missing"
BASE = Grade("ann", "01", "1.4", "The basic block", "beginner", 11, 11, "", "", 1.5, "x")


def grade(student: str, score: float, **more: object) -> Grade:
    return replace(BASE, student=student, score=score, **more)


GRADES = [
    grade("ann", 11), grade("ann", 7, exercise="1.3", max_score=7),
    grade("bob", 5, failed="values identity", message=LIKELY.format(3.1) + " | shape (2, 3)"),
    grade("bob", 3, exercise="1.3", max_score=7),
    grade("<b>eve", 0, failed="values", message=LIKELY.format(0.7)),
    grade("<b>eve", 0, exercise="1.3", max_score=7, failed="shape", message="missing"),
]  # fmt: skip


def test_mistakes_are_counted_whatever_the_numbers_around_them() -> None:
    found = mistakes(GRADES)
    assert found[0] == ("2 of 3", "the last ReLU is missing", "1.4", "<b>eve, bob")
    assert ("1 of 3", "shape (#, #)", "1.4", "bob") in found and len(found) == 3
    absent = [
        grade("ida", 0, exercise=number, message="not handed in") for number in ("1.3", "1.4")
    ]
    assert mistakes(GRADES + absent)[-1] == ("1 of 4", "not handed in", "all", "ida")


def test_the_page_of_three() -> None:
    text = class_page(GRADES, [])
    assert "3 students" in text and "Mean 8.7 and median 8.0 of 18 points" in text
    assert "&lt;b&gt;eve" in text and "<b>eve" not in text and "//" not in text
    assert "yes (+" in text  # who has 1.4 has 1.3
    assert re.search(r"<td>1.4</td>.*--share:67%\">2</span> <small>2<", text)  # values, 2 points
    same = [grade(name, 11) for name in ("ann", "bob")]
    assert "all alike" in class_page(same, [])


def solved(lesson: str, numbers: list[str]) -> str:
    text = lesson_path(lesson).read_text(encoding="utf-8")
    for number in numbers:
        text = put_in(text, SOLUTIONS[number])
    return text


def test_a_renamed_copy_is_shown_and_an_independent_solution_is_not(tmp_path: Path) -> None:
    own = solved("01", list(exercises("01")))
    copy = own.replace("self.squeeze", "self.down").replace("gate", "g")
    texts = {"ann": own, "bob": "# mine\n" + copy, "eve": solved("01", [])}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text + "# <script>", encoding="utf-8")
    page = class_page(GRADES, [Submission(name, tmp_path / f"{name}.py") for name in texts])
    assert "ann and bob, lesson 01" in page and "and eve" not in page
    assert "<td>01 BasicBlock</td><td>eve</td>" in page  # the course's own
    assert "# <script>" not in page
    marked = re.findall(r"<mark>(.*?)</mark>", page)
    assert any("conv" in line for line in marked)
    assert not any("class BasicBlock" in line for line in marked)  # the starter has that


def test_a_copy_under_another_name_and_with_a_byte_order_mark_is_shown(tmp_path: Path) -> None:
    own = solved("01", list(exercises("01")))
    for name, bom in (("ann", ""), ("bob", "\ufeff")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "solution.py").write_text(bom + own, encoding="utf-8")
    page = class_page(GRADES, [Submission(name, tmp_path / name) for name in ("ann", "bob")])
    assert "ann and bob, lesson 01: 100%" in page


def test_false_alarms_are_as_rare_as_the_page_says() -> None:
    """The course's solutions against the independent ones of the grader's tests."""
    shares, single = [], []
    for lesson in manifests():
        source = lesson_path(lesson).read_text(encoding="utf-8")
        given = shingles(take_out(source, exercises(lesson).values()))
        ours, theirs = (own(s, lesson) for s in (source, solved(lesson, list(exercises(lesson)))))
        whole = [shingles("\n".join(texts.values())) - given for texts in (ours, theirs)]
        shares.append(alike(*whole))
        single += [alike(shingles(ours[n]) - given, shingles(theirs[n]) - given) for n in ours]
    assert len(shares) == 9 and max(shares) <= 1 / 3 < ALIKE
    assert len(single) == 48 and max(single) <= 0.525


@pytest.mark.parametrize("text", ["def f(:", "x = '", "\0"])
def test_what_cannot_be_read_resembles_nothing(text: str) -> None:
    assert own(text, "01") == {}
    assert alike(shingles(text), shingles("a = 1 + 2 + 3 + 4")) == 0.0
