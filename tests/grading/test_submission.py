"""One test for each line of common/grading/exercises/points.csv: `pytest tests/grading --submission
DIR_OR_FILE`.
"""

import pytest

from common.grade import Result


def test_submission(result: Result) -> None:
    if not result.passed:
        pytest.fail(f"0 of {result.max_score:g} points: {result.message}", pytrace=False)
