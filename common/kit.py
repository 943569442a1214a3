"""A zip that a platform marks with: `python -m common.kit gradescope --lessons 01 --out kit.zip`.

gradescope    upload it as the assignment's autograder
classroom50   unpack it into CLASSROOM/autograders/ASSIGNMENT/ (the heir of GitHub Classroom)
prairielearn  unpack it into the question's folder

Each holds the course and the few lines that the platform calls. docs/GRADING.md says more.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import uuid
import zipfile
from pathlib import Path

from common.cli import OneLineParser, exit_codes
from common.engine.errors import UserError
from common.engine.files import write_atomically
from common.grade import parse_lessons
from common.grading.exercises import file_name
from common.grading.variants import course_files

# torch without CUDA is 200 MB and not 6 GB. pip must be told where it lies; uv knows the place by
# the backend's name. `-c` holds both packages to the versions that the course takes, or the second
# line would bring the large build after all.
SETUP = """#!/usr/bin/env bash
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
if command -v apt-get >/dev/null; then
    apt-get update && apt-get install -y python3 python3-venv
fi
python3 -m venv "$here/.venv"
"$here/.venv/bin/pip" install --quiet uv
install() {{ "$here/.venv/bin/uv" pip install --quiet --python "$here/.venv/bin/python" "$@"; }}
install -c "$here/requirements.txt" torch torchvision {where}
install -r "$here/requirements.txt"
"""

RUN_GRADESCOPE = """#!/usr/bin/env bash
# What Gradescope calls for each submission; ROOT is /autograder there.
root="${{ROOT:-/autograder}}"
cd "$root/source"
python="${{PYTHON:-$root/source/.venv/bin/python}}"
"$python" -m common.grade "$root/submission" --lessons {lessons} \\
    --grade-json "$root/results/results.json"
"""

AUTOGRADER = '''"""Called by Classroom 50 in the student's repository: leaves result.json there."""

import importlib.util
import subprocess
import sys
from pathlib import Path

course, student = Path(__file__).resolve().parent, Path.cwd()
if importlib.util.find_spec("torch") is None:  # a container with torch in it saves these minutes
    wanted = str(course / "requirements.txt")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "uv"], check=True)
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
    subprocess.run([*install, "-c", wanted, "torch", "torchvision", {where}], check=True)
    subprocess.run([*install, "-r", wanted], check=True)
command = [
    sys.executable, "-m", "common.grade", str(student), "--lessons", "{lessons}",
    "--platform", "classroom50", "--grade-json", str(student / "result.json"),
]
sys.exit(subprocess.run(command, cwd=course).returncode)
'''

RUN_PRAIRIELEARN = """#!/usr/bin/env bash
# What PrairieLearn's grader calls; ROOT is /grade there. The image holds requirements.txt.
root="${{ROOT:-/grade}}"
mkdir -p "$root/results"
cd "$root/tests/course"
"${{PYTHON:-python3}}" -m common.grade "$root/student" --lessons {lessons} \\
    --platform prairielearn --grade-json "$root/results/results.json"
"""


QUESTION = """<pl-question-panel>Hand in {files}.</pl-question-panel>
<pl-file-upload file-names="{files}"></pl-file-upload>
<pl-submission-panel><pl-external-grader-results></pl-external-grader-results></pl-submission-panel>
"""


def kit(platform: str, lessons: tuple[str, ...], index: str = "") -> dict[str, bytes]:
    """Name in the zip to content.

    Args:
        index: where torch's build without CUDA is taken from; "": PyTorch's own index.
    """
    course, named = course_files(), ",".join(lessons)
    where = ["--index-url", index] if index else ["--torch-backend", "cpu"]
    if platform == "gradescope":
        texts = {
            "setup.sh": SETUP.format(where=shlex.join(where)),
            "run_autograder": RUN_GRADESCOPE.format(lessons=named),
        }
    elif platform == "classroom50":
        listed = ", ".join(map(json.dumps, where))
        texts = {"autograder.py": AUTOGRADER.format(where=listed, lessons=named)}
    else:
        info = {
            "uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, "image-classification " + named)),
            "title": "Exercises of lesson " + named,
            "topic": "Convolutional networks",
            "type": "v3",
            "gradingMethod": "External",
            "externalGradingOptions": {
                "enabled": True, "image": "YOUR/IMAGE", "entrypoint": "/grade/tests/run.sh",
                "timeout": 600,
            },
        }  # fmt: skip
        texts = {
            "info.json": json.dumps(info, indent=2) + "\n",
            "question.html": QUESTION.format(files=",".join(map(file_name, lessons))),
            "tests/run.sh": RUN_PRAIRIELEARN.format(lessons=named),
        }
        course = {f"tests/course/{name}": data for name, data in course.items()}
    return {**{name: text.encode() for name, text in texts.items()}, **course}


def packed(files: dict[str, bytes]) -> bytes:
    """A zip of them, with what is to be run executable."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            mode = 0o755 if data.startswith(b"#!") else 0o644
            entry.external_attr, entry.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return out.getvalue()


def main(argv: list[str] | None = None) -> None:
    description, epilog = __doc__.split("\n\n", 1)
    parser = OneLineParser(
        prog="python -m common.kit", description=description, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("platform", choices=("gradescope", "classroom50", "prairielearn"))
    parser.add_argument("--lessons", required=True, metavar="NN,NN", help="what is marked")
    parser.add_argument("--out", type=Path, default=Path("kit.zip"), help="(default: kit.zip)")
    parser.add_argument(
        "--torch-index", default="", metavar="URL",
        help="take torch without CUDA from this index (default: PyTorch's own, by way of uv)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    with exit_codes():
        try:
            lessons = parse_lessons(options.lessons)
        except ValueError as error:
            raise UserError(f"--lessons: {error}") from None
        if "'" in options.torch_index or any(c.isspace() for c in options.torch_index):
            raise UserError(f"--torch-index {options.torch_index!r}: that is no address")
        files = kit(options.platform, lessons, options.torch_index)
        write_atomically(options.out, packed(files))
        print(f"{options.out}: {len(files)} files for {options.platform}, {', '.join(lessons)}")


if __name__ == "__main__":
    main()
