"""`pytest tests/grading --submission DIR_OR_FILE`: one test for each line of the table of points.

Nothing that decides about a score happens in a test: the tests only show what `common.grade` found
out. So `--grade-json` and the summary have a line for every line of the table also where a test did
not run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from common import grade
from common.grading.exercises import Worth, worth
from common.grading.sandbox import Limits, SandboxUnavailable, require_platform

LESSONS = Path(__file__).parent.parent.parent


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    # To pytest, what follows an option that it doesn't know yet is a path of tests: it would run
    # the conftest.py that lies beside the submission. After this one, none is loaded.
    pluginmanager._noconftest = True
    group = parser.getgroup("marking")
    group.addoption(
        "--submission",
        type=Path,
        default=LESSONS,
        help="file or folder to mark (default: the lessons)",
    )
    group.addoption(
        "--lessons",
        metavar="NN,NN",
        help="what the assignment consists of (default: all, of a file its own)",
    )
    group.addoption(
        "--grade-json", type=Path, metavar="FILE", help="write Gradescope's results.json"
    )
    group.addoption(
        "--time-limit",
        type=float,
        default=Limits().case_seconds,
        help="seconds of computing, per import and per case",
    )


def pytest_configure(config: pytest.Config) -> None:
    # The options are unknown where a run of the whole suite finds this file late: then the defaults
    # hold.
    path = config.getoption("--submission", LESSONS)
    try:
        require_platform()
        if not path.exists():
            raise ValueError(f"no such file or folder: {path}")
        submission = grade.Submission(path.stem, path)
        lessons = grade.lessons_for(submission, config.getoption("--lessons", None))
        if seed := grade.variant_of(submission, lessons):
            raise ValueError(f"variant {seed} is marked by python -m common.grade {path}")
    except (ValueError, SandboxUnavailable) as error:
        raise pytest.UsageError(f"--submission: {error}") from None
    config.stash[_MARKING] = Marking(submission, lessons)
    if not hasattr(config, "workerinput"):  # with pytest-xdist only the main process reports
        config.pluginmanager.register(Report(config), "marking-report")


class Marking:
    """What is marked, and the results so far, one exercise at a time as tests ask for them."""

    def __init__(self, submission: grade.Submission, lessons: tuple[str, ...]) -> None:
        self.submission, self.lessons = submission, lessons
        self.rows = worth(lessons)
        self.results: dict[str, list[grade.Result]] = {}

    def result(self, grader: grade.Grader, row: Worth) -> grade.Result:
        if row.exercise not in self.results:
            self.results[row.exercise] = grader.mark_exercise(self.submission, row.exercise)
        return next(r for r in self.results[row.exercise] if r.check == row.check)


_MARKING = pytest.StashKey[Marking]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        rows = metafunc.config.stash[_MARKING].rows
        metafunc.parametrize("row", rows, ids=[f"{row.exercise}-{row.check}" for row in rows])


@pytest.fixture(scope="session")
def grader(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Iterator[grade.Grader]:
    if pytestconfig.getoption("--submission", None) is None:  # a run of the whole suite
        yield request.getfixturevalue("warm_grader")
        return
    seconds = pytestconfig.getoption("--time-limit", Limits().case_seconds)
    limits = replace(Limits(), import_seconds=seconds, case_seconds=seconds)
    with grade.Grader(pytestconfig.stash[_MARKING].lessons, limits) as grader:
        yield grader


@pytest.fixture
def result(row: Worth, request: pytest.FixtureRequest, grader: grade.Grader) -> grade.Result:
    """The mark, and its copy in the test's report, from where the summary, results.json and JUnit's
    XML have it.
    """
    found = request.config.stash[_MARKING].result(grader, row)
    request.node.user_properties += asdict(found).items()
    return found


class Report:
    """Collects the results from the test reports, so that it works across pytest-xdist's processes
    too.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.marking = config.stash[_MARKING]
        self.json_path: Path | None = config.getoption("--grade-json", None)
        self.results: dict[tuple[str, str], grade.Result] = {}
        self.started = time.monotonic()
        self.save()  # so that the file is there and valid, with no points, if we are killed

    def complete(self) -> list[grade.Result]:
        return [
            self.results.get((r.exercise, r.check)) or grade.not_run(r) for r in self.marking.rows
        ]

    def save(self) -> None:
        if self.json_path:
            grade.write_json(self.json_path, self.complete(), time.monotonic() - self.started)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties)
        if report.when == "call" and "max_score" in found:
            result = grade.Result(**found)
            self.results[result.exercise, result.check] = result

    def pytest_sessionfinish(self) -> None:
        self.save()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.results:
            terminalreporter.section(f"marks of {self.marking.submission.path}")
            terminalreporter.write_line(grade.table(self.complete()))
