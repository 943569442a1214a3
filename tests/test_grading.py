"""The grader, graded: full points for the lessons, none for the starters, the right ones for the
wrong solutions.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from common import grade, starter
from common.grading.checks import CHECKS
from common.grading.exercises import (
    LEVELS,
    exercises,
    file_name,
    lesson_path,
    manifests,
    points,
    worth,
)
from common.grading.holes import functions_of, replace_part
from common.grading.sandbox import Limits
from tests.wrong_solutions import WRONG, Wrong

LESSONS = tuple(manifests())
NUMBERS = [number for lesson in LESSONS for number in exercises(lesson)]
ROOT = Path(grade.__file__).parent.parent


@pytest.fixture(scope="module")
def references() -> grade.References:
    return grade.References(seed=1)  # the seed of a real run is drawn anew


@pytest.fixture(scope="module")
def grader(references: grade.References) -> Iterator[grade.Grader]:
    """One for all tests: the host and the reference's observations are what costs."""
    with grade.Grader(LESSONS, references=references) as grader:
        yield grader


def mark(
    grader: grade.Grader, folder: Path, lesson: str, source: str | bytes
) -> list[grade.Result]:
    path = folder / file_name(lesson)
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    submission = grade.Submission("student", path)
    return [r for number in exercises(lesson) for r in grader.mark_exercise(submission, number)]


# ---------------------------------------------------------------------------------- tables agree


def test_the_table_and_the_manifests_agree() -> None:
    rows = points()
    assert len({(row.exercise, row.check) for row in rows}) == len(rows)
    assert {row.exercise for row in rows} == set(NUMBERS)
    assert {row.check for row in rows} <= set(CHECKS)
    for lesson in LESSONS:
        assert lesson_path(lesson).exists()
        for exercise in exercises(lesson).values():
            assert exercise.level in LEVELS and exercise.hint and exercise.cases and exercise.unseen
            assert exercise.number.startswith(f"{int(lesson)}.")
            checks = {row.check for row in rows if row.exercise == exercise.number}
            assert ("unseen" in checks) and ("result" in checks) == any(
                c.probe == "evaluate" for c in exercise.cases
            )
            for row in rows:
                if row.exercise == exercise.number:  # a check that is about nothing could not fail
                    assert (row.visibility == "hidden") == (row.check == "unseen")


# ---------------------------------------------------------------------------------- starters


@pytest.mark.parametrize("lesson", LESSONS)
def test_starters_keep_all_but_the_bodies(lesson: str) -> None:
    import ast

    def outline(source: str) -> list[str]:
        tree = ast.parse(source)
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
        lines = []
        for node in nodes:
            signature = ast.unparse(node.args) if isinstance(node, ast.FunctionDef) else ""
            lines.append(f"{node.name} {signature} {ast.get_docstring(node)}")
        return sorted(lines)

    lesson_source, text = (
        lesson_path(lesson).read_text(encoding="utf-8"),
        starter.make_starter(lesson),
    )
    inner = {"forward"}  # functions inside of a removed body go with it
    kept = outline(text)
    missing = [line for line in outline(lesson_source) if line not in kept]
    assert not [line for line in missing if line.split()[0] not in inner], missing
    compile(text, "starter", "exec")
    for number, exercise in exercises(lesson).items():
        assert f"Exercise {number}: " in text
        for part in exercise.parts:
            for function in functions_of(ast.parse(text), part):
                body = [n for n in function.body if not isinstance(n, ast.Expr)]
                assert len(body) == 1 and isinstance(body[0], ast.Raise)


def test_starters_import_cleanly_and_say_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert starter.main(["all", "--out", str(tmp_path)]) == 0
    assert "python -m common.grade" in capsys.readouterr().out
    names = sorted(path.stem for path in tmp_path.glob("*.py"))
    assert len(names) == len(LESSONS)
    code = f"import importlib; [importlib.import_module(n) for n in {names}]"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", code],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert starter.main(["all", "--out", str(tmp_path)]) == 2, (
        "a student's work must not be overwritten"
    )
    assert starter.main(["01", "--out", str(ROOT)]) == 2
    assert starter.main(["77", "--out", str(tmp_path)]) == 2


@pytest.mark.parametrize("lesson", LESSONS)
def test_each_exercise_alone_gives_its_own_points(
    lesson: str, grader: grade.Grader, tmp_path: Path
) -> None:
    """The bodies are put back one exercise at a time; at first none is there."""
    all_of_it = exercises(lesson)
    results = mark(grader, tmp_path, lesson, starter.make_starter(lesson))
    assert sum(r.score for r in results) == 0
    assert all(r.message.startswith("not done yet: Exercise") for r in results)
    for number, exercise in all_of_it.items():
        restored = [n for n, e in all_of_it.items() if set(e.parts) <= set(exercise.parts)]
        text = starter.make_starter(lesson, [n for n in all_of_it if n not in restored])
        results = mark(grader, tmp_path, lesson, text)
        assert {r.exercise for r in results if r.score} == set(restored), number
        assert all(r.passed for r in results if r.exercise in restored), number


# ---------------------------------------------------------------------------------- wrong solutions


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.exercise} {wrong.fault}")
def test_wrong_solutions_lose_the_right_checks(
    wrong: Wrong, grader: grade.Grader, tmp_path: Path
) -> None:
    path = tmp_path / file_name(wrong.lesson)
    path.write_text(wrong.source(), encoding="utf-8")
    results = grader.mark_exercise(grade.Submission("student", path), wrong.exercise)
    lost = [r for r in results if not r.passed]
    assert " ".join(r.check for r in lost) == wrong.lost, [r.message for r in lost]
    assert any(wrong.says in r.message for r in lost), [r.message for r in lost]


@pytest.mark.parametrize("lesson", sorted({wrong.lesson for wrong in WRONG}))
def test_wrong_parts_cost_no_other_exercise_a_point(
    lesson: str, grader: grade.Grader, tmp_path: Path
) -> None:
    """One fault in each exercise of the lesson at once: each loses what it loses alone."""
    text, lost = lesson_path(lesson).read_text(encoding="utf-8"), set()
    for number in exercises(lesson):
        for wrong in [w for w in WRONG if w.exercise == number][-1:]:
            text = replace_part(text, wrong.replaces, wrong.code)
            lost |= {(number, check) for check in wrong.lost.split()}
    results = mark(grader, tmp_path, lesson, text)
    assert {(r.exercise, r.check) for r in results if not r.passed} == lost


# ---------------------------------------------------------------------------- other right ones


RIGHT = """
import torch
from torch import nn


class SqueezeExcitation(nn.Module):
    def __init__(self, channels, reduction=16):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, channels // reduction), nn.ReLU(),
            nn.Linear(channels // reduction, channels), nn.Sigmoid(),
        )

    def forward(self, x):
        return self.gate(nn.functional.adaptive_avg_pool2d(x, 1))[:, :, None, None] * x


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels, channels, stride=1, shortcut="B", se_reduction=0):
        super().__init__()
        self.identity = make_shortcut(shortcut, in_channels, channels, stride)
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, "same", bias=False),
            nn.BatchNorm2d(channels),
        )
        if se_reduction:
            self.body.append(SqueezeExcitation(channels, se_reduction))

    def forward(self, x):
        identity = self.identity(x)
        return torch.relu(self.body(x) + identity)
"""


def test_other_names_order_and_layers_are_as_good(grader: grade.Grader, tmp_path: Path) -> None:
    """A file with two classes of its own making, with linear layers for 1x1 convolutions and the
    shortcut first.
    """
    results = mark(grader, tmp_path, "01", RIGHT)
    assert {r.exercise for r in results if r.score} == {"1.3", "1.4"}
    assert all(r.passed for r in results if r.exercise in ("1.3", "1.4"))
    others = {r.message for r in results if not r.passed}
    assert all("is not defined in 01_resnet_beginner.py" in message for message in others)


# ---------------------------------------------------------------------------------- messages


LESSON_5 = lesson_path("05").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            LESSON_5.replace("class DepthwiseS", "class Depthwises"),
            "did you mean Depthwiseseparable?",
        ),
        (LESSON_5 + "\nimport timm\n", "takes from timm"),
        (LESSON_5 + "\nfrom torchvision import models\n", "takes from torchvision's models"),
        (LESSON_5 + "\nimport_module('05_mobilenet_advanced')\n", "a lesson of the course"),
        (LESSON_5 + "\nopen('/x/05_mobilenet_advanced.py')\n", "may not read 05_mobilenet"),
        (
            LESSON_5 + "\nx = 'torchvision'\ngetattr(__import__(x), 'models').vgg11()\n",
            "may not use",
        ),
        (LESSON_5 + "\nprint(undefined)\n", "(line {last}: print(undefined))"),
        (LESSON_5 + "\ndef broken(:\n", "syntax error in line {last}"),
        (LESSON_5.encode() + "\n# é\n".encode("latin-1"), "line {last} is not UTF-8"),
        (LESSON_5.encode("utf-16"), "not readable as text"),
        (LESSON_5 + "\nimport sys\nsys.exit()\n", "it calls sys.exit() (line {last}"),
        (LESSON_5 + "\nimport os\nos._exit(0)\n", "ended the process itself with exit code 0"),
        (b"", "DepthwiseSeparable is not defined"),
    ],
)
def test_messages_name_the_fault(
    source: str | bytes, says: str, grader: grade.Grader, tmp_path: Path
) -> None:
    path = tmp_path / file_name("05")
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    results = grader.mark_exercise(grade.Submission("student", path), "5.1")
    assert sum(r.score for r in results) == 0
    last = len(LESSON_5.splitlines()) + (3 if b"sys.exit" in path.read_bytes() else 2)
    assert says.format(last=last) in results[0].message, results[0].message


def test_files_that_are_not_there_or_not_plain(grader: grade.Grader, tmp_path: Path) -> None:
    def message(path: Path) -> str:
        return grader.mark_exercise(grade.Submission("student", path), "5.1")[0].message

    (tmp_path / "mobilnet.py").write_text("")
    assert "no 05_mobilenet_advanced.py; there is mobilnet.py" in message(tmp_path)
    link = tmp_path / file_name("05")
    link.symlink_to(lesson_path("05"))
    assert "links are not followed" in message(tmp_path)
    link.unlink()
    os.mkfifo(link)
    assert "not a plain file" in message(tmp_path)


# ---------------------------------------------------------------------------------- a whole class


GOOD = LESSON_5


def with_forward(body: str) -> str:
    code = f"def forward(self, x):\n    {body}\n"
    return replace_part(GOOD, "DepthwiseSeparable.forward", code)


HOSTILE = {
    "loop_at_import": GOOD + "\nwhile True:\n    pass\n",
    "loop_in_c": with_forward("sum(range(10**11))"),
    "crash": GOOD + "\nimport ctypes\nctypes.string_at(0)\n",
    "exit": GOOD + "\nimport os\nos._exit(0)\n",
    "threads": GOOD
    + """
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(99,)).start()
""",
    "forks": GOOD
    + """
import os, time
for _ in range(200):
    if os.fork() == 0:
        os.setsid()
        time.sleep(999)
time.sleep(999)
""",
    "tensor": with_forward("return torch.zeros(25 * 10**9)"),
    "hoarder": GOOD + "\nhoard = []\nwhile True:\n    hoard.append(bytearray(2**24))\n",
    "printer": GOOD + "\nfor _ in range(10**6):\n    print('x')\n",
    "vandal": GOOD
    + """
for path in PATHS:
    try:
        open(path, "w").write("score,100")
    except OSError:
        pass
""",
    "killer": GOOD
    + """
import ctypes, os
for pid in (os.getppid(), GRADER):
    ctypes.CDLL(None).kill(pid, 9)
""",
    "patcher": with_forward("return x")
    + """
import json
torch.equal = torch.allclose = lambda *args, **options: True
json.loads = lambda *args: {"probe": "load", "number": 0}
""",
    "forger": GOOD
    + """
import os
os.write(3, b'{"score": 100}' + bytes([10]))
os.closerange(0, 99)
""",
    "encoding": GOOD.encode() + b"# \xe9\n",
    "syntax": GOOD + "\nclass (:\n",
}
KEEP_POINTS = {  # who does no harm to the other exercises keeps their points
    "loop_in_c": {"5.2", "5.3"},
    "tensor": {"5.2", "5.3"},
    "printer": {"5.1", "5.2", "5.3"},
    "vandal": {"5.1", "5.2", "5.3"},
    "killer": {"5.1", "5.2", "5.3"},
}


def test_a_class_of_forty_with_hostile_ones(
    grader: grade.Grader, references: grade.References, tmp_path: Path
) -> None:
    """Nobody is lost, nobody gains or loses by what a neighbour does, and a stopped run goes on."""
    folder, out = tmp_path / "class", tmp_path / "grades.csv"
    folder.mkdir()
    grader.mark_exercise(grade.Submission("lesson", lesson_path("05")), "5.2")
    guarded = (
        grader.host.own_user
    )  # without root the same user may overwrite files and kill: docs/GRADING.md
    for i in range(
        25
    ):  # three files of one class, as they come: a file, a folder, a folder in a folder
        place = [folder, folder / f"good_{i:02}", folder / f"good_{i:02}" / "src"][i % 3]
        place.mkdir(parents=True, exist_ok=True)
        text = GOOD if i % 5 else starter.make_starter("05", ["5.2"])
        (place / (f"good_{i:02}.py" if place == folder else file_name("05"))).write_text(text)
    for name, text in HOSTILE.items():
        if name in ("killer", "vandal") and not guarded:
            continue
        (folder / name).mkdir()
        if isinstance(text, str):
            paths = [str(out), str(folder / "good_01" / file_name("05"))]
            text = text.replace("PATHS", repr(paths)).replace("GRADER", str(os.getpid())).encode()
        (folder / name / file_name("05")).write_bytes(text)
    students = 25 + len(HOSTILE) - (0 if guarded else 2)
    limits = replace(Limits(), import_seconds=2, case_seconds=2)

    started = time.monotonic()
    grades = grade.mark_class(folder, out, ("05",), jobs=2, limits=limits, quiet=True)
    print(f"{students} students in {time.monotonic() - started:.1f} s")

    total = sum(row.points for row in worth(("05",)))
    by_student: dict[str, list[grade.Grade]] = {}
    for line in grades:
        by_student.setdefault(line.student, []).append(line)
    assert len(by_student) == students
    for student, lines in by_student.items():
        assert [line.exercise for line in lines] == list(exercises("05")), student
        assert sum(line.max_score for line in lines) == total, student
        full = {line.exercise for line in lines if line.score == line.max_score}
        if student.startswith("good"):
            assert full == ({"5.1", "5.2", "5.3"} if int(student[-2:]) % 5 else {"5.1", "5.3"}), (
                lines
            )
        else:
            assert full == KEEP_POINTS.get(student, set()), lines
            assert all(line.message for line in lines if line.exercise not in full), student
    with out.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(grades)

    # Stopped and started again: whoever is marked and unchanged stays so, one is new and one is
    # changed.
    (folder / "good_01" / file_name("05")).write_text("")
    kept = [
        line
        for line in out.read_text().splitlines(keepends=True)
        if not line.startswith("good_07,")
    ]
    out.write_text("".join(kept))
    second = grade.mark_class(folder, out, ("05",), jobs=2, limits=limits, quiet=True)
    assert {line.student for line in set(second) - set(grades)} == {"good_01", "good_07"}
    assert len(second) == len(grades)
    assert sum(line.score for line in second if line.student == "good_01") == 0


# ---------------------------------------------------------------------------------- reports


def max_score(tests: list[dict]) -> float:
    return sum(test["max_score"] for test in tests)


def test_results_json_and_junit_from_pytest(tmp_path: Path) -> None:
    """A starter through the command line, and only some of the tests: the total stays that of the
    table.
    """
    import xml.etree.ElementTree as ET

    submission, results, junit = (
        tmp_path / name for name in (file_name("05"), "results.json", "junit.xml")
    )
    submission.write_text(starter.make_starter("05", ["5.1"]), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/grading",
        "--submission",
        submission,
    ]
    command += ["--grade-json", results, "--junitxml", junit, "-k", "not 5.3"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    rows = worth(("05",))

    report = json.loads(results.read_text())
    assert isinstance(report["execution_time"], float)
    tests = report["tests"]
    assert [test["max_score"] for test in tests] == [row.points for row in rows]
    for row, test in zip(rows, tests):
        assert test["visibility"] == row.visibility
        assert isinstance(test["score"], float) and isinstance(test["max_score"], float)
        assert test["score"] == (row.points if row.exercise == "5.2" else 0)
        assert test["status"] == ("passed" if test["score"] else "failed")
    hidden_cases = [
        case.expression for exercise in exercises("05").values() for case in exercise.unseen
    ]
    visible = json.dumps([test for test in tests if test["visibility"] == "visible"])
    assert hidden_cases and not any(case in visible for case in hidden_cases)
    assert "unseen" not in visible and "output" not in report

    cases = ET.parse(junit).getroot().findall(".//testcase")
    assert len(cases) == sum(row.exercise != "5.3" for row in rows)
    assert sum(case.find("failure") is not None for case in cases) == sum(
        row.exercise == "5.1" for row in rows
    )
    assert "not done yet: Exercise 5.1" in done.stdout


def test_results_json_is_valid_after_the_grader_was_killed(tmp_path: Path) -> None:
    submission, results = tmp_path / file_name("05"), tmp_path / "results.json"
    submission.write_text(LESSON_5 + "\nwhile True:\n    pass\n")
    command = [sys.executable, "-m", "common.grade", submission, "--grade-json", results]
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def left() -> list[Path]:
        return list(scratch.glob("grader-*"))

    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(scratch)})
    try:
        wait_until(results.exists)
        # Now a worker runs the endless loop.
        wait_until(lambda: list(scratch.glob("grader-*/submission-*")))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    tests = json.loads(results.read_text())["tests"]
    assert max_score(tests) == sum(row.points for row in worth(("05",)))
    assert not any(test["score"] for test in tests)
    assert not list(tmp_path.glob(".results*"))
    wait_until(lambda: not left())  # the orphans end by themselves and clean up


def wait_until(condition: Callable[[], object], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_bad_input_is_exit_code_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "notes.py").write_text("x = 1")
    for arguments in (
        ["nowhere"],
        [str(tmp_path / "notes.py")],
        [str(tmp_path), "--lessons", "99"],
        [str(tmp_path / "notes.py"), "--out", str(tmp_path / "grades.csv")],
        [str(tmp_path), "--jobs", "0"],
    ):
        assert grade.main(arguments) == 2, arguments
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("grade: ") and output.err.count("\n") == 1


def test_without_a_warm_host_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: each worker imports torch itself, and `ps` says what it uses."""
    monkeypatch.setattr("common.grading.sandbox.LINUX", False)
    path = tmp_path / file_name("05")
    path.write_text(LESSON_5, encoding="utf-8")
    with grade.Grader(("05",)) as grader:
        results = grader.mark_exercise(grade.Submission("student", path), "5.2")
    assert grader.host.preload == () and all(r.passed for r in results), results


def test_a_fault_of_the_grader_costs_one_student_and_only_until_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "class", tmp_path / "grades.csv"
    (folder / os.fsdecode(b"caf\xe9")).mkdir(parents=True)  # a name that is no UTF-8
    (folder / "beta").mkdir()
    (folder / "gamma").symlink_to(ROOT)  # a link to the solutions
    mark_one = grade.Grader.mark

    def fail(self: grade.Grader, submission: grade.Submission) -> Iterator[list[grade.Result]]:
        if submission.name == "beta":
            raise KeyError("a bug")
        return mark_one(self, submission)

    with monkeypatch.context() as patch:
        patch.setattr(grade.Grader, "mark", fail)
        first = grade.mark_class(folder, out, ("05",), jobs=2, limits=Limits(), quiet=True)
    second = grade.mark_class(folder, out, ("05",), jobs=2, limits=Limits(), quiet=True)
    for grades, says in ((first, "the grader failed: KeyError('a bug')"), (second, "missing file")):
        messages = {line.student: line.message for line in grades}
        assert set(messages) == {"beta", "caf\\xe9", "gamma"}
        assert says in messages["beta"] and "links are not followed" in messages["gamma"]
        total = sum(row.points for row in worth(("05",)))
        assert sum(line.max_score for line in grades) == 3 * total
        assert sum(line.score for line in grades) == 0


def test_a_formula_in_a_message_stays_text(tmp_path: Path) -> None:
    line = grade.Grade(
        "=1+1", "05", "5.1", "t", "beginner", 0.0, 1.0, "shape", "@SUM(A1)", 0.1, "d"
    )
    grade._write_grades(tmp_path / "grades.csv", {line.student: [line]})
    assert "\n'=1+1,05" in (tmp_path / "grades.csv").read_text()
    assert grade._read_grades(tmp_path / "grades.csv")[0].student == "=1+1"
