"""Marks in the forms that other platforms read. Each is checked in the tests, key by key."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from common.grading.exercises import exercises, lesson_of

OfExercise = TypeVar("OfExercise")  # what has a field `exercise`: a Result, a Grade

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.grading.marking import Result


def by_exercise(results: Iterable[OfExercise]) -> dict[str, list[OfExercise]]:
    """By the number of their exercise, in the order in which the numbers come."""
    groups: dict[str, list[OfExercise]] = {}
    for r in results:
        groups.setdefault(r.exercise, []).append(r)
    return groups


def gradescope(results: list[Result], seconds: float) -> dict[str, Any]:
    """`results.json` in Gradescope's form. Each test speaks for itself alone: nothing visible tells
    how a hidden one went, only of what kind its cases are.
    """
    hints: dict[tuple[str, str], str] = {}
    for number, group in by_exercise(results).items():
        last = [r for r in group if r.visibility == "visible"][-1:]
        kind = exercises(lesson_of(number))[number].kind
        hints |= {(r.exercise, r.check): f"\nThe hidden cases: {kind}." for r in last}
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
                "output": (r.message or "passed") + hints.get((r.exercise, r.check), ""),
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
    it is public to the student, so of hidden checks no message is in it.

    Args:
        environment: what its runner says of the submission.
    """
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    tests = []
    for number, group in by_exercise(results).items():
        shown = dict.fromkeys(
            f"{r.check}: {r.message}"
            for r in group
            if r.message and not r.passed and r.visibility == "visible"
        )
        tests.append(
            {
                "test-name": f"{number} {group[0].title}",
                "passed": all(r.passed for r in group),
                "score": int(sum(r.score for r in group) + 1e-9),
                "max-score": round(sum(r.max_score for r in group)),
                "output": "\n".join(shown),
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
        "datetime": now,
        "score": sum(test["score"] for test in tests),
        "max-score": sum(test["max-score"] for test in tests),
        "tests": tests,
    }


def prairielearn(results: list[Result], seconds: float) -> dict[str, Any]:
    """`results.json` of PrairieLearn's external grading. A hidden check has points, no message."""
    got, most = sum(r.score for r in results), sum(r.max_score for r in results)
    return {
        "gradable": True,
        "score": got / most if most else 0.0,
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
    "gradescope": gradescope,
    "classroom50": classroom50,
    "prairielearn": prairielearn,
}
