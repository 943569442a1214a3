"""Variants of an assignment: each is right by its own reference, and by no other.

VARIANTS=all tries every exercise that varies, and not two of lesson 1's alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from common import grade, starter
from common.grading.exercises import exercises, file_name, lesson_of, lesson_path, manifests
from common.grading.variants import (
    CHOICES,
    OWN,
    Option,
    drawn,
    head,
    make_course,
    seed_of,
    texts,
)
from tests.warm import Warm

MARK = """
import json, sys
from pathlib import Path
from common.grading.marking import Grader, Submission
asked = json.loads(sys.argv[1])  # exercise: folders of submissions
told = {}
with Grader(sorted({int(n.split(".")[0]) and f"{int(n.split('.')[0]):02d}" for n in asked})) as g:
    g.references.name = lambda *parts: ""  # points alone are asked for
    for number, folders in asked.items():
        for folder in folders:
            results = g.mark_exercise(Submission("x", Path(folder)), number)
            told[f"{number} {Path(folder).name}"] = [
                sum(r.score for r in results), sum(r.max_score for r in results)
            ]
print(json.dumps(told))
"""


def test_two_hundred_variants_fit_the_lessons_and_name_themselves() -> None:
    seen = set()
    for seed in range(1, 201):
        chosen = drawn(seed)
        changed = texts(chosen)
        assert chosen == drawn(seed) and all(option.says for option in chosen.values())
        for lesson in manifests():
            line = head(seed, lesson)
            assert seed_of(f'"""A file."""\n{line}\n') == seed
            differs = any(o.says for n, o in chosen.items() if lesson_of(n) == lesson)
            assert (Path(file_name(lesson)) in changed) == differs
        seen.add(tuple(o.says for n, o in chosen.items() if n.startswith("1.")))
    assert len(seen) > 20 and all(len(options) > 1 for options in CHOICES.values())
    assert not texts(drawn(0)) and seed_of("no head") == 0


def test_each_specification_is_met_by_its_own_solution_alone(tmp_path: Path) -> None:
    """Every option of an exercise as the reference, against the solutions of all its options."""
    every = os.environ.get("VARIANTS") == "all"
    numbers = [n for n in CHOICES if every or n in ("1.1", "1.3")]
    most = max(len(CHOICES[n]) for n in numbers)

    def option(number: str, k: int) -> Option:
        options = CHOICES[number]
        return options[min(k, len(options) - 1)]

    for k in range(most):  # submissions: every exercise in its k-th form
        make = {number: option(number, k) for number in numbers}
        for lesson in {lesson_of(n) for n in numbers}:
            text = texts(make).get(Path(file_name(lesson))) or lesson_path(lesson).read_text()
            path = tmp_path / str(k) / file_name(lesson)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for k in range(1, most if every else 3):  # the course as it is has tests of its own
        course = tmp_path / f"course{k}"
        make_course({number: option(number, k) for number in numbers}, course)
        asked = {
            n: [str(tmp_path / str(j)) for j in range(len(CHOICES[n]))]
            for n in numbers
            if k < len(CHOICES[n])
        }
        code, out, err = Warm(tmp_path, "-c", MARK, json.dumps(asked), cwd=course).join()
        assert code == 0, err
        for which, (got, worth) in json.loads(out).items():
            number, j = which.split()
            assert (got == worth) == (int(j) == k), f"{number}: form {j} where {k} was asked: {got}"


def test_a_starter_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = next(s for s in range(1, 99) if drawn(s)["1.3"].says == "the gate is 1 + tanh")
    assert starter.main(["01", "--out", str(tmp_path), "--variant", str(seed)]) == 0
    text = (tmp_path / file_name("01")).read_text(encoding="utf-8")
    assert seed_of(text) == seed and "the gate is 1 + tanh" in text
    assert "1 + tanh after them" in text.replace('"\n            "', "")
    assert "Scale by 1 + tanh computed" in text and "torch.sigmoid(self.excite" not in text
    for wrong in ("-1", "9" * 12):
        assert starter.main(["01", "--out", str(tmp_path), "--variant", wrong]) == 2
    assert "--variant" in capsys.readouterr().err


def test_the_roster_or_the_file_tells_the_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class of three variants is marked in three courses, and lands in one table."""
    asked: list[tuple[int, list[str]]] = []

    def fake(seed: int, arguments: Iterable[str], stdout: int | None = None) -> int:
        where, _, out, _, students, *_ = arguments
        names = json.loads(Path(students).read_text(encoding="utf-8"))
        asked.append((seed, sorted(f"{name}.py" for name in names)))
        assert Path(where) == folder.resolve()
        rows = {
            name: [
                grade.Grade(name, "00", n, "", "beginner", 1, 2, "", "", 0.0, "x")
                for n in exercises("00")
            ]
            for name in names
        }
        grade._write_grades(Path(out), rows)
        return 0

    monkeypatch.setattr(grade, "in_variant", fake)
    folder = tmp_path / "in"
    folder.mkdir()
    for name, seed in (("ann", 7), ("bob", 0), ("eve", 0)):
        line = f"# Variant {seed}: x.\n" if seed else ""
        (folder / f"{name}.py").write_text(line, encoding="utf-8")
    roster = tmp_path / "names.csv"
    roster.write_text("student,variant\nann,7\neve,12\nzoe,3\n", encoding="utf-8")
    out = tmp_path / "out" / "grades.csv"
    out.parent.mkdir()
    flags = ["--out", str(out), "--lessons", "00", "--roster", str(roster)]
    assert grade.main([str(folder), *flags]) == 0
    assert asked == [(0, ["bob.py"]), (7, ["ann.py"]), (12, ["eve.py"])]
    students = [line.split(",")[0] for line in out.read_text().splitlines()[1:]]
    assert set(students) == {"ann", "bob", "eve", "zoe"}
    assert (out.parent / "class.html").exists()
    roster.write_text("student,variant\nann,seven\n", encoding="utf-8")
    assert grade.main([str(folder), *flags]) == 2
    assert "the variant of ann is 'seven'" in capsys.readouterr().err


def test_a_number_of_ten_digits_is_found_again(tmp_path: Path) -> None:
    """As a student's is; the largest seed that the starter takes."""
    assert starter.main(["01", "--out", str(tmp_path), "--variant", str(2**31 - 1)]) == 0
    assert seed_of((tmp_path / file_name("01")).read_text(encoding="utf-8")) == 2**31 - 1


def test_no_file_stops_the_marks_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of two variants, and a number with too many digits for Python to read."""
    (tmp_path / "ann").mkdir()
    for lesson, seed in (("00", "3"), ("01", "4")):
        (tmp_path / "ann" / file_name(lesson)).write_text(head(int(seed), lesson))
    (tmp_path / f"eve_{file_name('00')}").write_text(f"# Variant {'9' * 5000}: 0.1: x.\n")
    found = grade.find_submissions(tmp_path, tmp_path / "grades.csv")
    assert set(grade.variants_of(found, ("00", "01"), {}).values()) == {0}
    assert "its files are of several variants: [3, 4]" in capsys.readouterr().err


def test_an_edit_that_no_longer_fits_says_where() -> None:
    with pytest.raises(ValueError, match=r"variant of 1\.1, 01_resnet_beginner.py.*0 times"):
        texts({"1.1": Option("x", (("no such text", "y"),), ("", ""))})
    assert texts({"1.1": OWN}) == {}
