"""Each platform's folders, made here: the kit is unpacked there, called as it would be called, and
what it leaves is checked against the platform's own description, key by key.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from common.grading.exercises import exercises, lesson_path, worth
from common.grading.marking import Result
from common.grading.platforms import classroom50
from common.kit import kit, packed

LESSON = "00_augmentation.py"  # the quickest to mark
ROWS = worth(("00",))
MOST = sum(row.points for row in ROWS)


@pytest.fixture(scope="module")
def solved() -> str:
    return lesson_path("00").read_text(encoding="utf-8")


def unpack(platform: str, folder: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(packed(kit(platform, ("00",))))) as archive:
        archive.extractall(folder)
        for entry in archive.infolist():
            os.chmod(folder / entry.filename, entry.external_attr >> 16)


def call(*command: str | Path, cwd: Path, **environment: str) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_gradescope(tmp_path: Path, solved: str) -> None:
    unpack("gradescope", tmp_path / "source")
    assert (tmp_path / "source/setup.sh").stat().st_mode & 0o111
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / LESSON).write_text(solved, encoding="utf-8")
    call(tmp_path / "source/run_autograder", cwd=tmp_path, ROOT=str(tmp_path))
    told = json.loads((tmp_path / "results/results.json").read_text(encoding="utf-8"))
    assert set(told) == {"execution_time", "stdout_visibility", "tests"}
    visible = {"visible", "hidden", "after_due_date", "after_published"}
    for test in told["tests"]:
        keys = "name number score max_score status output visibility"
        assert set(test) == set(keys.split())
        assert test["status"] in ("passed", "failed") and test["visibility"] in visible
        assert isinstance(test["number"], str)
    assert sum(test["score"] for test in told["tests"]) == MOST


def test_classroom50(tmp_path: Path, solved: str) -> None:
    """The required keys and patterns are those of its result-v1 schema."""
    unpack("classroom50", tmp_path / "bundle")
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / LESSON).write_text(solved, encoding="utf-8")
    said = {
        "CLASSROOM": "cnn", "ASSIGNMENT": "lesson-00", "ASSIGNMENT_TYPE": "individual",
        "OWNER": "ann", "SUBMISSION_TAG": "submit/2026-01-02T03-04-05Z-abc", "COMMIT_URL": "c",
        "RELEASE_URL": "r", "REVIEW_URL": "v",
    }  # fmt: skip
    call(sys.executable, tmp_path / "bundle/autograder.py", cwd=repository, **said)
    told = json.loads((repository / "result.json").read_text(encoding="utf-8"))
    assert set(told) == {
        "schema", "classroom", "assignment", "assignment_type", "owner", "submission", "commit",
        "release", "review", "datetime", "score", "max-score", "tests",
    }  # fmt: skip
    assert told["schema"] == "classroom50/result/v1" and told["owner"] == "ann"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told["datetime"])
    assert told["score"] == told["max-score"] == MOST
    for test in told["tests"]:
        assert {"test-name", "passed", "score", "max-score"} <= set(test)
        assert type(test["score"]) is int and type(test["max-score"]) is int
    assert len(told["tests"]) == len(exercises("00"))


def test_prairielearn_and_an_empty_hand_in(tmp_path: Path) -> None:
    unpack("prairielearn", tmp_path)
    info = json.loads((tmp_path / "info.json").read_text(encoding="utf-8"))
    assert info["gradingMethod"] == "External" and info["externalGradingOptions"]["enabled"]
    assert LESSON in (tmp_path / "question.html").read_text(encoding="utf-8")
    (tmp_path / "student").mkdir()
    call("bash", tmp_path / "tests/run.sh", cwd=tmp_path, ROOT=str(tmp_path))
    told = json.loads((tmp_path / "results/results.json").read_text(encoding="utf-8"))
    assert told["gradable"] is True and told["score"] == 0.0
    assert sum(test["max_points"] for test in told["tests"]) == MOST
    for test in told["tests"]:
        assert {"name", "points", "max_points", "message"} == set(test)


def test_parts_of_a_point_are_cut_off_and_hidden_messages_kept_back() -> None:
    results = [
        Result("1.4", "values", "The basic block", 1.5, 2, "visible", "seen"),
        Result("1.4", "unseen", "The basic block", 0.4, 1, "hidden", "not seen"),
    ]
    told = classroom50(results, 1.0, {})
    assert (told["score"], told["max-score"]) == (1, 3)
    assert told["tests"][0]["output"] == "values: seen" and not told["tests"][0]["passed"]


def test_an_index_for_torch_is_written_where_pip_is_called() -> None:
    assert b"--index-url 'URL'" in kit("gradescope", ("01",), "URL")["setup.sh"]
    assert b"\"--index-url\", 'URL'" in kit("classroom50", ("01",), "URL")["autograder.py"]
    assert b"index-url" not in kit("gradescope", ("01",))["setup.sh"]
