"""Marks in the forms that other platforms read. Each is checked in the tests, key by key."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from common.grading.exercises import exercises, lesson_of

Row = TypeVar("Row")  # a Result or a Grade

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from common.grade import Grade
    from common.grading.marking import Result


def grouped(rows: Iterable[Row], field: str) -> dict[str, list[Row]]:
    """By the value of that field, in the order in which the values come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(getattr(row, field), []).append(row)
    return groups


def points_of(rows: Sequence[Result | Grade]) -> tuple[float, float]:
    """Those that were got, and all there are."""
    return sum(row.score for row in rows), sum(row.max_score for row in rows)


def gradescope(results: list[Result], seconds: float) -> dict[str, Any]:
    """`results.json` in Gradescope's form. Each test speaks for itself alone: nothing visible tells
    how a hidden one went, only of what kind its cases are.
    """
    last_visible = {r.exercise: r for r in results if r.visibility == "visible"}

    def hint(r: Result) -> str:
        kind = exercises(lesson_of(r.exercise))[r.exercise].kind
        return f"\nThe hidden cases: {kind}." if last_visible.get(r.exercise) is r else ""

    return {
        "execution_time": round(seconds, 3),
        "stdout_visibility": "hidden",
        "tests": [
            {
                "name": f"{r.exercise} {r.title}: {r.check}",
                "number": r.exercise,
                "score": r.score,
                "max_score": r.max_score,
                "status": "passed" if r.passed else "failed",
                "output": (r.message or "passed") + hint(r),
                "visibility": r.visibility,
            }
            for r in results
        ],
    }


def classroom50(
    results: list[Result], seconds: float, environment: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """`result.json` of Classroom 50, which follows GitHub Classroom: schema classroom50/result/v1.

    It knows whole points only, so a test is an exercise, and parts of a point are cut off. All of
    it is public to the student, so of hidden checks no message is in it. `environment` is what its
    runner says of the submission.
    """
    tests = []
    for number, group in grouped(results, "exercise").items():
        got, most = points_of(group)
        failed = [r for r in group if not r.passed and r.visibility == "visible"]
        tests.append(
            {
                "test-name": f"{number} {group[0].title}",
                "passed": all(r.passed for r in group),
                "score": int(got + 1e-9),
                "max-score": round(most),
                "output": "\n".join(f"{r.check}: {r.message}" for r in failed),
            }
        )
    commit = environment.get("COMMIT_URL", "")
    return {
        "schema": "classroom50/result/v1",
        "classroom": environment.get("CLASSROOM", ""),
        "assignment": environment.get("ASSIGNMENT", ""),
        "assignment_type": environment.get("ASSIGNMENT_TYPE") or "individual",
        "owner": environment.get("OWNER") or environment.get("USERNAME", ""),
        "submission": environment.get("SUBMISSION_TAG", ""),
        "commit": commit,
        "release": environment.get("RELEASE_URL", ""),
        "review": environment.get("REVIEW_URL") or commit,
        "datetime": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "score": sum(test["score"] for test in tests),
        "max-score": sum(test["max-score"] for test in tests),
        "tests": tests,
    }


def prairielearn(results: list[Result], seconds: float) -> dict[str, Any]:
    """`results.json` of PrairieLearn's external grading. A hidden check has points, no message."""
    got, most = points_of(results)
    return {
        "gradable": True,
        "score": got / most,
        "message": f"{got:g} of {most:g} points in {seconds:.0f} s",
        "tests": [
            {
                "name": f"{r.exercise} {r.title}: {r.check}",
                "points": r.score,
                "max_points": r.max_score,
                "message": (r.message or "passed") if r.visibility == "visible" else "hidden",
            }
            for r in results
        ],
    }


PLATFORMS: dict[str, Callable[[list[Result], float], dict[str, Any]]] = {
    form.__name__: form for form in (gradescope, classroom50, prairielearn)
}
