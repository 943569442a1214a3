"""Each platform's folders, made here: the kit is unpacked there, called as it would be called, and
what it leaves is checked against the platform's own description, key by key.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from common.grading.exercises import exercises, lesson_path, worth
from common.grading.marking import Result
from common.grading.platforms import classroom50, prairielearn
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
    """Nothing handed in, then all of it. The script is copied out of the unpacked zip."""
    unpack("gradescope", tmp_path / "source")
    assert (tmp_path / "source/setup.sh").stat().st_mode & 0o111
    shutil.copy2(tmp_path / "source/run_autograder", tmp_path)
    (tmp_path / "submission").mkdir()
    for points in (0, MOST):
        if points:
            (tmp_path / "submission" / LESSON).write_text(solved, encoding="utf-8")
        call(tmp_path / "run_autograder", cwd=tmp_path, ROOT=str(tmp_path))
        told = json.loads((tmp_path / "results/results.json").read_text(encoding="utf-8"))
        assert set(told) == {"execution_time", "stdout_visibility", "tests"}
        visible = {"visible", "hidden", "after_due_date", "after_published"}
        for test in told["tests"]:
            keys = "name number score max_score status output visibility"
            assert set(test) == set(keys.split())
            assert test["status"] in ("passed", "failed") and test["visibility"] in visible
            assert isinstance(test["number"], str)
        assert sum(test["score"] for test in told["tests"]) == points


def test_classroom50(tmp_path: Path, solved: str) -> None:
    """The required keys and patterns are those of its result-v1 schema."""
    unpack("classroom50", tmp_path / "bundle")
    repository = tmp_path / "repository"
    repository.mkdir()
    said = {
        "CLASSROOM": "cnn", "ASSIGNMENT": "lesson-00", "ASSIGNMENT_TYPE": "individual",
        "OWNER": "ann", "SUBMISSION_TAG": "submit/2026-01-02T03-04-05Z-abc", "COMMIT_URL": "c",
        "RELEASE_URL": "r", "REVIEW_URL": "v",
    }  # fmt: skip
    for points in (0, MOST):
        if points:
            (repository / LESSON).write_text(solved, encoding="utf-8")
        call(sys.executable, tmp_path / "bundle/autograder.py", cwd=repository, **said)
        told = json.loads((repository / "result.json").read_text(encoding="utf-8"))
        assert set(told) == {
            "schema", "classroom", "assignment", "assignment_type", "owner", "submission",
            "commit", "release", "review", "datetime", "score", "max-score", "tests",
        }  # fmt: skip
        assert told["schema"] == "classroom50/result/v1" and told["owner"] == "ann"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told["datetime"])
        assert (told["score"], told["max-score"]) == (points, MOST)
        for test in told["tests"]:
            assert {"test-name", "passed", "score", "max-score"} <= set(test)
            assert type(test["score"]) is int and type(test["max-score"]) is int
            assert 0 <= test["score"] <= test["max-score"]
        assert len(told["tests"]) == len(exercises("00"))


def test_prairielearn_and_an_empty_hand_in(tmp_path: Path) -> None:
    unpack("prairielearn", tmp_path)
    info = json.loads((tmp_path / "info.json").read_text(encoding="utf-8"))
    assert {"uuid", "type", "title", "topic"} <= set(info) and uuid.UUID(info["uuid"])
    assert info["gradingMethod"] == "External" and info["externalGradingOptions"]["enabled"]
    entry = tmp_path / info["externalGradingOptions"]["entrypoint"].removeprefix("/grade/")
    assert LESSON in (tmp_path / "question.html").read_text(encoding="utf-8")
    (tmp_path / "student").mkdir()
    entry.chmod(0o755)  # as the platform does
    call(entry, cwd=tmp_path, ROOT=str(tmp_path))
    told = json.loads((tmp_path / "results/results.json").read_text(encoding="utf-8"))
    assert told["gradable"] is True and told["score"] == 0.0
    assert sum(test["max_points"] for test in told["tests"]) == MOST
    for test in told["tests"]:
        assert {"name", "points", "max_points", "message"} == set(test)


RESULTS = [
    Result("1.4", "values", "The basic block", 1.5, 2, "visible", "seen"),
    Result("1.4", "unseen", "The basic block", 0.4, 1, "hidden", "not seen"),
]


def test_prairielearn_wants_a_share() -> None:
    told = prairielearn(RESULTS, 1.0)
    assert told["score"] == pytest.approx(1.9 / 3)
    assert [test["points"] for test in told["tests"]] == [1.5, 0.4]
    assert "not seen" not in json.dumps(told)
    right = [replace(r, score=r.max_score, message="") for r in RESULTS]
    assert prairielearn(right, 1.0)["score"] == 1.0


def test_parts_of_a_point_are_cut_off_and_hidden_messages_kept_back() -> None:
    told = classroom50(RESULTS, 1.0, {})
    assert (told["score"], told["max-score"]) == (1, 3)
    assert told["tests"][0]["output"] == "values: seen" and not told["tests"][0]["passed"]


@pytest.mark.parametrize(
    ("index", "asked"), [("", "--torch-backend cpu"), ("my index", "--index-url my index")]
)
@pytest.mark.parametrize("platform", ["gradescope", "classroom50"])
def test_torch_is_installed_without_cuda(
    tmp_path: Path, platform: str, index: str, asked: str
) -> None:
    """With a Python that only writes down what it is called with."""
    files = kit(platform, ("01",), index)
    log, fake = tmp_path / "log", tmp_path / "python3"
    copies = 'mkdir -p "$3/bin"; cp "$0" "$3/bin/pip"; cp "$0" "$3/bin/uv"'
    fake.write_text(
        f'#!/usr/bin/env bash\necho "$@" >> {log}\nif [ "$2" = venv ]; then {copies}; fi\n'
    )
    fake.chmod(0o755)
    shutil.copy(fake, tmp_path / "apt-get")
    if platform == "gradescope":
        (tmp_path / "setup.sh").write_bytes(files["setup.sh"])
        call("bash", tmp_path / "setup.sh", cwd=tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin")
    else:
        source = files["autograder.py"].decode()
        found: dict = {"__file__": str(tmp_path / "autograder.py")}
        never = mock.patch("importlib.util.find_spec", return_value=None)
        with never, mock.patch("sys.executable", str(fake)), pytest.raises(SystemExit):
            exec(compile(source, "autograder.py", "exec"), found)
    lines = [line for line in log.read_text().splitlines() if "--quiet" in line]
    assert lines[0].endswith(" --quiet uv") and lines[2].endswith("requirements.txt")
    assert re.search(rf" -c \S+requirements.txt torch torchvision {asked}$", lines[1])
    assert len(lines) == 3
