"""The grader, graded: full points for the lessons, none for the starters, the right ones for the
wrong solutions.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from common import grade, starter
from common.grading import marking
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
from common.grading.holes import functions_of, put_in
from common.grading.marking import code_of_notebook
from common.grading.sandbox import Limits
from tests import grading_cases
from tests.grading_solutions import SOLUTIONS
from tests.warm import Warm

LESSONS = tuple(manifests())
NUMBERS = [number for lesson in LESSONS for number in exercises(lesson)]
ROOT = Path(grade.__file__).parent.parent


@pytest.fixture(scope="module")
def grader(warm_grader: grade.Grader) -> grade.Grader:
    return warm_grader


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
    text = f"""
import importlib, sys, warnings
warnings.simplefilter("error", SyntaxWarning)
sys.path.insert(0, {str(tmp_path)!r})
[importlib.import_module(name) for name in {names}]
"""
    code, out, err = Warm(tmp_path, "-c", text).join()
    assert code == 0 and out == "", err
    assert starter.main(["all", "--out", str(tmp_path)]) == 2, (
        "a student's work must not be overwritten"
    )
    assert starter.main(["01", "--out", str(ROOT)]) == 2
    assert starter.main(["77", "--out", str(tmp_path)]) == 2
    other = tmp_path / "other"
    assert starter.main(["02", "--only", "1.3", "--out", str(other)]) == 2
    assert not other.exists(), "a lesson without a hole is its solution"


@pytest.mark.parametrize(
    ("lesson", "experiment"),
    [
        ("02", ""),
        ("04", "compound-scaling"),
        ("05", "separable"),
        ("06", "reuse"),
    ],
)
def test_a_block_runs_under_all_names_that_its_hint_leaves_free(
    lesson: str, experiment: str, tmp_path: Path
) -> None:
    text = lesson_path(lesson).read_text(encoding="utf-8")
    for node in [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef)]:
        hints = " ".join(e.hint for e in exercises(lesson).values() if node.name in e.parts)
        fields = [n for n in ast.walk(node) if isinstance(n, ast.Attribute)]
        own = {n.attr for n in fields if isinstance(n.ctx, ast.Store)} if hints else set()
        block = renamed = ast.get_source_segment(text, node)
        for name in own - set(re.findall(r"\w+", hints)):
            renamed = re.sub(rf"\bself\.{name}\b", f"self.my_{name}", renamed)
        text = text.replace(block, renamed)
    path = tmp_path / file_name(lesson)
    path.write_text(text, encoding="utf-8")
    flags = "--smoke --dataset digits".split()
    flags += ["--experiment", experiment, "--seeds", "1"] if experiment else []
    code, _, err = Warm(tmp_path, str(path), *flags, "--run-dir", str(tmp_path / "runs")).join()
    assert code == 0, err


@pytest.mark.parametrize("lesson", LESSONS)
def test_each_exercise_alone_gives_its_own_points(
    lesson: str, grader: grade.Grader, tmp_path: Path
) -> None:
    """The starter has none. With one exercise solved and all others left open, that one has all."""
    all_of_it = exercises(lesson)
    results = mark(grader, tmp_path, lesson, starter.make_starter(lesson))
    assert sum(r.score for r in results) == 0
    assert all(r.message.startswith("not done yet: Exercise") for r in results)
    for number, exercise in all_of_it.items():
        open_ones = [n for n, e in all_of_it.items() if not set(e.parts) & set(exercise.parts)]
        path = tmp_path / file_name(lesson)
        path.write_text(starter.make_starter(lesson, open_ones), encoding="utf-8")
        results = grader.mark_exercise(grade.Submission("student", path), number)
        assert all(r.passed for r in results), results


# ------------------------------------------------------------ mistakes, other right ones, thieves

SAMPLE = ("0.1", "1.3", "1.4", "2.4", "3.5", "4.1", "5.3", "6.1", "7.4", "8.2")


@pytest.fixture(scope="module")
def trier(grader: grade.Grader, tmp_path_factory: pytest.TempPathFactory) -> grading_cases.Trier:
    return grading_cases.Trier(tmp_path_factory.mktemp("trier"), grader)


def some(cases: tuple, every: int) -> list:
    """A fixed sample; all of them: `python -m tests.grading_cases --all`."""
    return [
        case for number in SAMPLE for case in [c for c in cases if c.exercise == number][::every]
    ]


def test_every_case_fits_the_solution_that_it_changes() -> None:
    """Those that the sample leaves out, too: a solution that is put otherwise breaks none."""
    for case in (*grading_cases.MISTAKES, *grading_cases.RIGHT):
        assert ast.parse(case.code()), case
        assert (case.code() != SOLUTIONS[case.exercise]) == bool(case.old), case


@pytest.mark.parametrize(
    "case", some(grading_cases.MISTAKES, 4), ids=lambda case: f"{case.exercise} {case.what}"
)
def test_mistakes_are_found_and_named(case: grading_cases.Edit, trier: grading_cases.Trier) -> None:
    outcome = trier.edit("mistake", case)
    assert outcome.lost and not outcome.hidden_only
    assert outcome.named, [r.message for r in outcome.lost]
    said = [r.message.partition("; likely: ") for r in outcome.lost]  # and said once
    assert not [parts for parts in said if parts[2] and "a ReLU" in parts[0]]


@pytest.mark.parametrize(
    "case", some(grading_cases.RIGHT, 3), ids=lambda case: f"{case.exercise} {case.what}"
)
def test_other_right_solutions_are_accepted(
    case: grading_cases.Edit, trier: grading_cases.Trier
) -> None:
    outcome = trier.edit("right", case)
    assert not outcome.lost, [r.message for r in outcome.lost]


@pytest.mark.parametrize("what", list(grading_cases.THEFT)[::7])
def test_nothing_is_stolen(what: str, trier: grading_cases.Trier) -> None:
    assert trier.theft(what, "00").points == 0


def test_a_worker_reads_and_writes_only_what_it_should(
    grader: grade.Grader, tmp_path: Path
) -> None:
    """What the submission could open it would tell in the message of its own error."""
    code = """
found = []
for path in PATHS:
    try:
        found.append(open(path, "rb").read(1))
    except OSError:
        pass
for folder in FOLDERS:
    try:
        open(f"{folder}/left-behind", "w").close()
        found.append(folder)
    except OSError:
        pass
raise ValueError(f"opened {found}")
"""
    paths = [str(lesson_path("05")), str(ROOT / "common" / "augmentation.py"), "/etc/passwd"]
    paths += [str(ROOT / ".git"), f"/proc/{os.getpid()}/environ"]
    code = code.replace("PATHS", repr(paths)).replace("FOLDERS", repr(["/tmp", "/dev/shm"]))
    message = mark(grader, tmp_path, "05", LESSON_5 + code)[0].message
    if not grader.host.confined:
        pytest.skip("this kernel has no Landlock")
    assert "opened []" in message


def test_every_activation_matters_whatever_the_draw() -> None:
    """1.3 without its ReLU, for many seeds; without a sandbox, which would take minutes."""
    missing = grading_cases.without_relu(range(20))
    assert missing == []


def test_the_least_silent_of_all_draws_is_taken() -> None:
    """And the first without silence ends them."""
    for silent, at, asked in (([2, 1, 0, 0], 2, 3), ([3, 1, 2, 1], 1, 4)):
        worker = mock.Mock()
        worker.ask.side_effect = [{"silent": ["a ReLU"] * n} for n in silent]
        seen = marking._drawn(worker, {"seed": 7}, len(silent))
        assert (seen["seed"], len(seen["silent"])) == (7 + 1000 * at, silent[at])
        assert worker.ask.call_count == asked


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


def test_a_mention_of_another_exercises_static_method_costs_nothing(
    grader: grade.Grader, tmp_path: Path
) -> None:
    """The reference's method is put into the class that is mentioned."""
    path = tmp_path / file_name("08")
    text = lesson_path("08").read_text(encoding="utf-8")
    line = "    def forward(self, logits: Tensor, y: Tensor) -> Tensor:\n        log_p"
    assert text.count(line) == 1
    mention = line.replace("log_p", "_ = GradientReversal\n        log_p")
    path.write_text(text.replace(line, mention))
    results = grader.mark_exercise(grade.Submission("student", path), "8.4")
    assert all(result.passed for result in results), results


@pytest.mark.skipif(sys.platform != "linux", reason="real-time signals")
def test_a_signal_that_python_has_no_name_for(grader: grade.Grader, tmp_path: Path) -> None:
    path = tmp_path / file_name("05")
    path.write_text(LESSON_5 + "\nimport os\nos.kill(os.getpid(), 40)\n")
    (result, *_) = grader.mark_exercise(grade.Submission("student", path), "5.1")
    assert not result.passed and "crashed (Real-time signal" in result.message


# ---------------------------------------------------------------------------------- a whole class


GOOD = LESSON_5


def with_forward(body: str) -> str:
    code = f"class DepthwiseSeparable:\n    def forward(self, x):\n        {body}\n"
    return put_in(GOOD, code)


HOSTILE = {
    "loop_at_import": GOOD + "\nwhile True:\n    pass\n",
    "loop_in_c": with_forward("sum(range(10**11))"),
    "printer": GOOD + "\nfor _ in range(10**4):\n    print('x' * 1000)\n",
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
}
GOODS = 5
KEEP_POINTS = {  # who does no harm to the other exercises keeps their points
    "loop_in_c": {"5.2", "5.3", "5.4"},
    "printer": {"5.1", "5.2", "5.3", "5.4"},
    "vandal": {"5.1", "5.2", "5.3", "5.4"},
    "killer": {"5.1", "5.2", "5.3", "5.4"},
}


def mark_all(
    folder: Path, out: Path, by: grade.Grader, limits: Limits | None = None, **options: object
) -> list[grade.Grade]:
    """With `limits` a host is started beside `by`'s own; else that marks one at a time."""
    found, make, warm = grade.find_submissions(folder, out), grade.Grader, [by.host]

    def borrow(lessons: tuple[str, ...], *rest: object) -> grade.Grader:
        one = make(lessons, limits, by.references)
        with contextlib.suppress(IndexError):
            one.host = warm.pop()
        return one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grade, "References", lambda: by.references)  # the lessons were observed
        patch.setattr(grade, "Grader", borrow)
        patch.setattr(by.host, "close", lambda: None)
        jobs, limits = 2 if limits else 1, limits or Limits()
        patch.setattr(by.host, "limits", limits)
        return grade.mark_class(found, out, ("05",), jobs, limits, quiet=True, **options)


def test_a_class_with_hostile_ones(grader: grade.Grader, tmp_path: Path) -> None:
    """Nobody is lost, nobody gains or loses by what a neighbour does, and a stopped run goes on."""
    folder, out = tmp_path / "class", tmp_path / "grades.csv"
    folder.mkdir()
    grader.mark_exercise(grade.Submission("lesson", lesson_path("05")), "5.2")
    guarded = (
        grader.host.own_user
    )  # without root the same user may overwrite files and kill: docs/GRADING.md
    # Files as they come: a file, a folder, a folder in a folder.
    for i in range(GOODS):
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
    students = GOODS + len(HOSTILE) - (0 if guarded else 2)
    limits = replace(Limits(), import_seconds=1.5, case_seconds=1.5, patience=20)

    started = time.monotonic()
    grades = mark_all(folder, out, grader, limits)
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
            holes = set() if int(student[-2:]) % 5 else {"5.2"}
            assert full == {"5.1", "5.2", "5.3", "5.4"} - holes, lines
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
        if not line.startswith("good_04,")
    ]
    out.write_text("".join(kept))
    second = mark_all(folder, out, grader)
    assert {line.student for line in set(second) - set(grades)} == {"good_01", "good_04"}
    assert len(second) == len(grades)
    assert sum(line.score for line in second if line.student == "good_01") == 0


# ---------------------------------------------------------------------------------- reports


def max_score(tests: list[dict]) -> float:
    return sum(test["max_score"] for test in tests)


def test_results_json_and_junit_from_pytest(tmp_path: Path) -> None:
    """A starter through the command line, and only some of the tests: the total stays that of the
    table. And a conftest.py beside the submission does not run.
    """
    import xml.etree.ElementTree as ET

    submission, results, junit = (tmp_path / name for name in ("ann", "results.json", "junit.xml"))
    submission.mkdir()
    text = starter.make_starter("05", ["5.1"])
    (submission / file_name("05")).write_text(text, encoding="utf-8")
    shown = tmp_path / "it ran"
    (submission / "conftest.py").write_text(f"open({str(shown)!r}, 'w').close()\n")
    run = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    flags = ["-p", "no:cacheprovider", "--submission", submission, "--grade-json", results]
    flags += ["--junitxml", junit, "-k", "not 5.3", "--lessons", "05"]
    code, out, err = Warm(tmp_path, "-c", run, "tests/grading", *flags).join()
    assert code == 1 and "total" in out and not shown.exists(), out + err
    rows = worth(("05",))

    report = json.loads(results.read_text())
    assert isinstance(report["execution_time"], float)
    tests = report["tests"]
    assert [test["max_score"] for test in tests] == [row.points for row in rows]
    for row, test in zip(rows, tests):
        assert test["visibility"] == row.visibility
        assert isinstance(test["score"], float) and isinstance(test["max_score"], float)
        assert test["score"] == (row.points if row.exercise in ("5.2", "5.4") else 0)
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
    assert "not done yet: Exercise 5.1" in out


def test_results_json_is_valid_after_the_grader_was_killed(tmp_path: Path) -> None:
    submission, results = tmp_path / file_name("05"), tmp_path / "results.json"
    loop = "\nopen('begun', 'w').close()\nwhile True:\n    pass\n"
    submission.write_text(LESSON_5 + loop)
    command = [sys.executable, "-m", "common.grade", submission, "--grade-json", results]
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def left() -> list[Path]:
        return list(scratch.glob("grader-*"))

    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(scratch)})
    try:
        wait_until(results.exists)
        wait_until(lambda: list(scratch.glob("grader-*/submission-*/begun")))
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
        [str(tmp_path), "--lessons", "05,"],
        [str(lesson_path("00")), "--lessons", "00", "--grade-json", str(tmp_path)],
    ):
        assert grade.main(arguments) == 2, arguments
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("grade: ") and output.err.count("\n") == 1


def test_a_lesson_named_twice_counts_once() -> None:
    assert grade.parse_lessons("1, 01,05") == ("01", "05")


def test_a_manifest_with_a_fault_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    bad = tmp_path / "05.ini"
    bad.write_text("[5.1]\ntitle = a\ntitle = b\n")
    every = {**manifests(), "05": bad}
    exercises.cache_clear()
    monkeypatch.setattr("common.grading.exercises.manifests", lambda: every)
    try:
        assert starter.main(["05", "--out", str(tmp_path / "out")]) == 2
    finally:
        exercises.cache_clear()
    error = capsys.readouterr().err
    assert "05.ini" in error and error.count("\n") == 1


def test_marks_of_other_checks_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of grades.csv is about the checks that it was made by."""
    for name in ("checks.py", "exercises"):
        source = grade.FOLDER.parent / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    monkeypatch.setattr(grade, "FOLDER", tmp_path / "exercises")
    before = grade._rules_digest(("05",))
    with (tmp_path / "checks.py").open("a") as file:
        file.write("# mended\n")
    assert grade._rules_digest(("05",)) != before


def test_twins_have_their_own_time(grader: grade.Grader, tmp_path: Path) -> None:
    """Two who hand in the same slow file: the second is marked as the first is."""
    for name in ("ann", "bob"):
        (tmp_path / name).mkdir()
        (tmp_path / name / file_name("05")).write_text(LESSON_5, encoding="utf-8")
    one, two = (grade.Submission(name, tmp_path / name) for name in ("ann", "bob"))
    first = grader.mark_exercise(one, "5.2")
    for key in grader.seconds:
        if key[0] == one.path:
            grader.seconds[key] = 0.0
    assert all(result.passed for result in [*first, *grader.mark_exercise(two, "5.2")])
    assert not any(result.passed for result in grader.mark_exercise(one, "5.2"))


def test_without_a_warm_host_too(
    grader: grade.Grader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS: each worker imports torch itself, and `ps` says what it uses. What it sees is
    what a fork of a warm host saw.
    """
    grader.references.get(exercises("05")["5.2"], grader.host)
    monkeypatch.setattr("common.grading.sandbox.LINUX", False)
    path = tmp_path / file_name("05")
    path.write_text(LESSON_5, encoding="utf-8")
    with grade.Grader(("05",), references=grader.references) as cold:
        results = cold.mark_exercise(grade.Submission("student", path), "5.2")
    assert cold.host.preload == () and all(r.passed for r in results), results


def test_a_fault_of_the_grader_costs_one_student_and_only_until_the_next_run(
    grader: grade.Grader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        first = mark_all(folder, out, grader)
    second = mark_all(folder, out, grader)
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


def test_a_notebooks_magics_go_and_its_code_stays() -> None:
    cells = [
        "%matplotlib inline\n!pip list\nif True:\n    %cd /\na = 1",
        "%%bash\nls",
        "%%time\nb = 2",
    ]
    cells.append('c = (\n    "%d"\n    % a\n)\nd = (\n    a\n    != b\n)')
    book = {"cells": [{"cell_type": "code", "source": text} for text in cells]}
    found: dict[str, object] = {}
    exec(code_of_notebook("a.ipynb", json.dumps(book).encode()), found)
    assert (found["a"], found["b"], found["c"], found["d"]) == (1, 2, "1", True)


def test_notebooks_archives_and_namesakes_have_lines(
    grader: grade.Grader, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """None is ignored in silence, and who handed in nothing is on the roster."""
    folder, out = tmp_path / "class", tmp_path / "grades.csv"
    (folder / "ann").mkdir(parents=True)
    cells = [{"cell_type": "markdown", "source": ["text"]}]
    cells += [{"cell_type": "code", "source": ["%matplotlib inline\n", LESSON_5]}]
    (folder / "ann" / "05_mobilenet_advanced.ipynb").write_text(json.dumps({"cells": cells}))
    (folder / "ann.PY").write_text("")
    (folder / "bob.zip").write_bytes(b"PK")
    (folder / "notes.txt").write_text("")
    roster = tmp_path / "names.csv"
    roster.write_text("student,group\nann,1\nbob,1\ncy,2\n")
    names = grade.read_roster(roster)
    grades = mark_all(folder, out, grader, roster=names)
    points_of = {line.student: 0.0 for line in grades}
    for line in grades:
        points_of[line.student] += line.score
    total = sum(row.points for row in worth(("05",)))
    assert points_of == {"ann/": total, "ann.PY": 0, "bob": 0, "cy": 0}
    said = {line.student: line.message for line in grades}
    assert "not unpacked" in said["bob"] and "not handed in" in said["cy"]
    notes = capsys.readouterr().err
    assert "more than one submission is called ann" in notes and "notes.txt" in notes
