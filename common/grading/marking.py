"""Marking: a submission's source goes into workers, their observations become points.

Scores are made here, in the grader's own process, out of the table `points.csv` and of observations
that workers send (`sandbox`). Every line of the table gives exactly one result, whatever the
submission does, so that the total never changes.
"""

from __future__ import annotations
import __future__

import ast
import base64
import contextlib
import hashlib
import json
import marshal
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from common.grading import checks
from common.grading.checks import agree
from common.grading.exercises import (
    ROOT,
    Case,
    Exercise,
    Worth,
    exercises,
    file_name,
    lesson_of,
    lesson_path,
    manifests,
    worth,
)
from common.grading.holes import definitions, functions_of, put_in
from common.grading.sandbox import Host, Limits, Worker, WorkerLost

SOURCE_LIMIT = 1 << 20  # bytes of code; a notebook, with its pictures, may have ten times that
MARKED = (".py", ".ipynb")
PACKED = (".zip", ".gz", ".tgz", ".tar", ".7z", ".rar", ".xz", ".bz2")
MESSAGE_LIMIT = 1000  # characters of one result's message
Seen = dict[str, Any]  # one observation: what a worker told of one case
SKETCH = 256  # numbers of an output, enough to tell one variant from another; as in `probes`


@dataclass(frozen=True)
class Result:
    """What one line of the table of points gave."""

    exercise: str
    check: str
    title: str
    score: float
    max_score: float
    visibility: str
    message: str  # "" where the check passed
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.score == self.max_score


# ------------------------------------------------------------------------------------- submissions


@dataclass(frozen=True)
class Submission:
    """A student's file, or a folder of files named like the lessons."""

    name: str
    path: Path

    def source(self, lesson: str, only: bool = False) -> tuple[str, bytes]:
        """File name and content of what was submitted for `lesson`; of a notebook its code cells.
        `only`: no other lesson is marked, so that a file of any name can be meant.

        Raises: ValueError, a line for the student: there is no such file, or it can't be taken.
        """
        if self.path.is_symlink():
            raise ValueError(f"{self.path.name} is a link; links are not followed")
        if self.path.resolve() == ROOT:  # the lessons themselves
            return file_name(lesson), lesson_path(lesson).read_bytes()
        path = self._file(lesson, only) if self.path.is_dir() else self.path
        if path.suffix.lower() in PACKED:
            raise ValueError(f"{path.name} is not unpacked: hand in the .py or .ipynb file itself")
        return path.name, _code(path)

    def _file(self, lesson: str, only: bool) -> Path:
        """The one of the folder that is meant."""
        wanted = file_name(lesson)
        inside = sorted(p for p in self.path.rglob("*") if not is_hidden(p.relative_to(self.path)))
        files = [p for p in inside if p.suffix.lower() in MARKED]
        found = (
            [p for p in files if p.stem.lower() == Path(wanted).stem.lower()]
            or [p for p in files if re.match(rf"{lesson}\D", p.name)]
            or (files if only and len(files) == 1 else [])
        )
        # A notebook beside the script that was made of it, or the other way round: one of the two
        # may be the starter still.
        scripts = [p for p in found if p.suffix.lower() == ".py"]
        if len(scripts) == 1 and len(found) == 2:
            found = [
                max(sorted(found, key=scripts.count, reverse=True), key=partial(_done, lesson))
            ]
        found = [p for p in found if p in scripts] or found
        if len(found) > 1:
            places = ", ".join(str(p.relative_to(self.path)) for p in found[:3])
            raise ValueError(f"more than one file for lesson {lesson}: {places}; leave one")
        if not found:
            packed = [p.name for p in inside if p.suffix.lower() in PACKED]
            names = ", ".join(p.name for p in files[:5])
            there = f"there is {names}" if names else "there is no .py file at all"
            if packed:
                there = f"{packed[0]} is not unpacked: hand in the files themselves"
            raise ValueError(f"missing file: no {wanted}; {there}")
        return found[0]

    def lesson(self) -> str | None:
        """The lesson that a lone file belongs to, by its name or else by what it defines."""
        match = re.match(r"\d\d(?=\D)", self.path.name)
        if match and match[0] in manifests():
            return match[0]
        try:
            text = _code(self.path).decode("utf-8", "replace")
        except ValueError:
            return None
        defined = set(re.findall(r"^(?:class|def)\s+(\w+)", text, re.MULTILINE))
        known = dict.fromkeys(manifests(), 0)
        for lesson in known:
            parts = {part.split(".")[0] for e in exercises(lesson).values() for part in e.parts}
            known[lesson] = len(defined & parts)
        best = max(known, key=known.get)
        return best if known[best] else None

    def digest(self, lessons: tuple[str, ...]) -> str:
        """Changes when the files that would be marked change."""
        sha = hashlib.sha256()
        for lesson in lessons:
            try:
                name, data = self.source(lesson, only=len(lessons) == 1)
            except ValueError as error:
                name, data = "", str(error).encode()
            sha.update(f"{lesson} {name} {len(data)} ".encode() + data)
        return sha.hexdigest()[:16]


def code_of_notebook(name: str, data: bytes) -> bytes:
    """The code cells as one file. Lines for IPython (%magic, !command) become comments.

    Raises: ValueError, if it is no notebook.
    """
    try:
        cells = json.loads(data)["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell.get("cell_type") == "code"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{name} can't be read as a notebook") from None
    if sum(map(len, texts)) > SOURCE_LIMIT:
        raise ValueError(f"{name} has more than {SOURCE_LIMIT >> 20} MB of code")
    lines = ["display = print  # in a notebook it is always there"]
    for number, text in enumerate(texts, 1):
        lines += [f"# %% code cell {number}", *_as_python(text)]
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


_MAGICS = (  # what only IPython understands, and what stands there instead
    (re.compile(r"^(\s*)%time\s+(\S.*)$"), r"\1\2"),
    (re.compile(r"^(\s*)(%%?[A-Za-z].*|!(?!=).*|\?.*|[\w.]+\?\??\s*)$"), r"\1pass  # \2"),
    (re.compile(r"^(\s*[^=()\s][^=()]*=\s*)([!%].*)$"), r"\1None  # \2"),
)


def _as_python(text: str) -> list[str]:
    """The lines of a code cell. Where it is Python as it stands, nothing in it is a magic."""
    lines = text.splitlines()
    if re.match(r"\s*%%(?!(time|timeit|capture|prun)\b)", text):  # another language, as a rule
        return [f"# {line}" for line in lines]
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        ast.parse(text)
        return lines
    found, goes_on = [], False
    for line in lines:
        new = f"# {line}" if goes_on else line
        for magic, instead in _MAGICS:
            new = magic.sub(instead, new)
        goes_on = new != line and line.endswith("\\")
        found.append(new)
    return found


def _done(lesson: str, path: Path) -> int:
    """How far the exercises of the lesson are done in a file: parts that are there, less holes."""
    try:
        text = _code(path).decode("utf-8", "replace")
    except ValueError:
        return -SOURCE_LIMIT
    parts = {part.split(".")[0] for e in exercises(lesson).values() for part in e.parts}
    there = parts & set(re.findall(r"^(?:class|def)\s+(\w+)", text, re.MULTILINE))
    return len(there) - text.count("raise NotImplementedError")


def is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _code(path: Path) -> bytes:
    """The code of a plain file: a link may point anywhere, and a pipe never ends."""
    notebook = path.suffix.lower() == ".ipynb"
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is not a plain file (links are not followed)")
        limit = SOURCE_LIMIT * (10 if notebook else 1)
        if status.st_size > limit:
            raise ValueError(f"{path.name} is larger than {limit >> 20} MB")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} can't be read: {error.strerror}") from None
    return code_of_notebook(path.name, data) if notebook else data


# ----------------------------------------------------------------------------------------- marking


class Grader(contextlib.AbstractContextManager):
    """Marks submissions one after another, and keeps a host process warm for them. The graders of a
    class share `references`, so that the lessons are observed once.
    """

    def __init__(
        self,
        lessons: tuple[str, ...],
        limits: Limits | None = None,
        references: References | None = None,
    ) -> None:
        self.lessons = lessons
        self.references = references or References()
        # The first step of any optimizer imports torch._dynamo, which takes more than a second.
        preload = ["import torch._dynamo", "import numpy", "import common.grading.probes"]
        preload += [line for lesson in lessons for line in _reference(lesson)[0].split("\n")]
        self.host = Host(preload, limits or Limits())
        # By submission, lesson and content: what is left, and why it can't be run at all.
        self.seconds: dict[tuple[Path, str, bytes], float] = {}
        self.hopeless: dict[tuple[Path, str, bytes], str] = {}

    def __exit__(self, *exc_info: object) -> None:
        self.host.close()

    def mark(self, submission: Submission) -> Iterator[list[Result]]:
        """The results of one exercise after another: one per line of the table."""
        for lesson in self.lessons:
            for number in exercises(lesson):
                yield self.mark_exercise(submission, number)

    def mark_exercise(self, submission: Submission, number: str) -> list[Result]:
        """The results of one exercise. A file that can't be run is not tried again for the next."""
        exercise = exercises(lesson_of(number))[number]
        try:
            filename, data = submission.source(exercise.lesson, only=len(self.lessons) == 1)
        except ValueError as error:
            return _all_lost(exercise, str(error))
        key = submission.path, exercise.lesson, hashlib.sha256(data).digest()
        left = self.seconds.setdefault(key, self.host.limits.lesson_seconds)
        late = "not marked: the time for the whole lesson is used up" if left <= 0 else ""
        if why := self.hopeless.get(key) or late:
            return _all_lost(exercise, why)
        seeds, theirs = self.references.get(exercise, self.host)
        started = time.monotonic()
        mine, self.hopeless[key] = observe(
            self.host, exercise, filename, data, seeds, started + left, theirs
        )
        self.seconds[key] -= time.monotonic() - started  # to name the mistakes is our time
        return self._judge(exercise, mine, theirs, started)

    def _judge(
        self, exercise: Exercise, mine: list[Seen], theirs: list[Seen], started: float
    ) -> list[Result]:
        rows = _rows(exercise)
        asked = tuple(row.check for row in rows)
        cases = exercise.cases + exercise.unseen
        trials = [checks.Trial(case, m, t, asked) for case, m, t in zip(cases, mine, theirs)]
        visible, hidden = trials[: len(exercise.cases)], trials[len(exercise.cases) :]
        results = []
        for row in rows:
            about = checks.trials_of(row.check, visible, hidden)
            failed = checks.failures(row.check, about)
            # Each expression is worth its share; any other check is passed or not.
            share = 1 - len(failed) / len(about) if row.check == "result" else float(not failed)
            message = self._message(exercise, row, trials, *failed[0]) if failed else ""
            if failed and share:
                message = f"{len(failed)} of {len(about)} cases fail; {message}"
            seconds = (time.monotonic() - started) / len(rows)
            results.append(_result(row, message, seconds, share))
        return results

    def _message(
        self, exercise: Exercise, row: Worth, trials: list[checks.Trial], trial: checks.Trial,
        text: str,
    ) -> str:  # fmt: skip
        if text.startswith(checks.ALL_CASES):
            return text
        with contextlib.suppress(Exception):  # what a worker sent may be anything
            if name := self.references.name(exercise, trials, trial, row.check, self.host):
                # A known mistake says more than what the check itself makes of the numbers.
                text = re.split(
                    "; it would be right after|; there is a ReLU|: unused in forward", text
                )[0]
                text += f"; likely: {name}"
        if row.check == "unseen":
            if trial.case.probe == "evaluate":  # who reads the answer could write it down
                text = re.sub(r"expected .*?, got .*?(?=; likely: |$)", "another value comes", text)
            return f"a case that is not printed (of the kind: {exercise.kind}): {text}"
        return f"{trial.case}: {text}"


class References:
    """What the lessons do, observed once for each exercise, with numbers that no student can
    foresee; and what they would do with known mistakes in them.
    """

    DRAWS = 20  # seeds to try for a case, until each activation matters

    def __init__(self, seed: int | None = None) -> None:
        self.seed = secrets.randbits(31) if seed is None else seed
        self._kept: dict[tuple[str, ...], Any] = {}
        self._lock = threading.RLock()

    def _once(self, key: tuple[str, ...], make: Callable[..., Any], *args: object) -> Any:
        """What `make` gives, made once for all graders."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make(*args)
            return self._kept[key]

    def get(self, exercise: Exercise, host: Host) -> tuple[list[int], list[Seen]]:
        """The seed of each case, and what was seen with it.

        Raises: RuntimeError, if the lesson itself fails: then nobody can be marked.
        """
        return self._once((exercise.number,), self._look, exercise, host)

    def _look(self, exercise: Exercise, host: Host) -> tuple[list[int], list[Seen]]:
        path, cases = lesson_path(exercise.lesson), exercise.cases + exercise.unseen
        seeds = [self.seed + i for i in range(len(cases))]
        given = host, exercise, path.name, path.read_bytes(), seeds
        found, _ = observe(*given, draws=self.DRAWS)
        for case, seen in zip(cases, found):
            if error := seen.get("error") or seen.get("forward_error"):
                raise RuntimeError(
                    f"exercise {exercise.number}, the reference itself: {case}: {error}"
                )
        return [seen.get("seed", seed) for seen, seed in zip(found, seeds)], found

    def name(
        self, exercise: Exercise, trials: list[checks.Trial], trial: checks.Trial, check: str,
        host: Host,
    ) -> str:  # fmt: skip
        """The likely mistake: the one known that gives what the submission gave; else ''. Of
        several the one that gives it in the most of all `trials`, right ones too.
        """
        if "error" in trial.mine or "forward_error" in trial.mine:
            return ""
        number, place = exercise.number, (exercise.cases + exercise.unseen).index(trial.case)
        asked = host, exercise, self.get(exercise, host)[0]
        known = self._once((number, "manifest"), manifest_mistakes, *asked)
        fits = [(name, seen) for name, seen in known if _explains(trial, check, seen[place])]
        if fits:
            return max(fits, key=lambda fit: sum(map(_gives, trials, fit[1])))[0]
        # With other layers than the reference's, no mistake in the reference's can explain it.
        if trial.case.probe != "observe" or checks.layer_difference(trial):
            return ""
        for name, seen in self._once((number, trial.case.text), made_mistakes, *asked, place):
            if _explains(trial, check, seen):
                return name
        if check in ("values", "unseen") and agree(trial.mine.get("eval"), trial.theirs["eval"]):
            return "right in eval mode, not in train mode: dropout (rate, place) or BatchNorm"
        return ""


def _gives(trial: checks.Trial, known: Seen) -> bool:
    """Whether a known mistake gives what the submission gave, right or wrong."""
    if trial.case.probe == "evaluate":
        mine, theirs = (side.get("value", side.get("error")) for side in (trial.mine, known))
        return not checks.value_difference(mine, theirs)
    return agree(trial.mine.get("eval"), known.get("eval"))


def _explains(trial: checks.Trial, check: str, known: Seen) -> bool:
    """Whether a known mistake gives what the submission gave and the reference doesn't."""
    mine, theirs = trial.mine, trial.theirs
    if trial.case.probe == "evaluate":
        return "value" in known and not checks.value_difference(mine["value"], known["value"])
    if trial.case.probe == "count":
        return known.get("parameters") == mine["parameters"] != theirs["parameters"]

    def gives(mode: str, wanted: list[dict] | None) -> bool:
        numbers = mine[mode]
        return agree(checks.sketch_of(numbers, SKETCH) if "sketch" in known else numbers, wanted)

    right = agree(mine["eval"], theirs["eval"])
    # Of the manifest's mistakes the whole observation is known.
    evaluated, trained = known.get("sketch") or (known.get("eval"), known.get("train"))
    if (check == "identity" and right) or not gives("eval", evaluated):
        return False
    if not right:
        return True
    modes = [mode for mode in ("train", "train_flipped") if mode in mine]
    return not agree(mine["train"], theirs["train"]) and any(gives(m, trained) for m in modes)


def manifest_mistakes(
    host: Host, exercise: Exercise, seeds: list[int]
) -> list[tuple[str, list[Seen]]]:
    """What is seen of each case with the wrong code that the manifest has."""
    path = lesson_path(exercise.lesson)
    source = path.read_text(encoding="utf-8")
    aided = replace(exercise, setup=f"{exercise.setup}\n{exercise.aids}")
    return [
        (name, observe(host, aided, path.name, put_in(source, code).encode(), seeds)[0])
        for name, code in exercise.mistakes
    ]


def made_mistakes(
    host: Host, exercise: Exercise, seeds: list[int], place: int
) -> list[tuple[str, Seen]]:
    """What comes out of one case with one step of the reference's done wrong."""
    path = lesson_path(exercise.lesson)
    question = _question((exercise.cases + exercise.unseen)[place], seeds[place])
    try:
        with contextlib.closing(Worker(host)) as worker:
            _load(worker, exercise, path.name, path.read_bytes())
            answer = worker.ask({**question, "probe": "mistakes"}, 4 * host.limits.case_seconds)
    except WorkerLost:
        return []  # a mistake without a name is still a mistake
    return [(name, {"sketch": outputs}) for name, *outputs in answer.get("mistakes", ())]


def observe(
    host: Host,
    exercise: Exercise,
    filename: str,
    data: bytes,
    seeds: list[int],
    deadline: float = float("inf"),
    theirs: list[Seen] | None = None,
    draws: int = 1,
) -> tuple[list[Seen], str]:
    """Try all cases of one exercise in a worker of its own: what was seen of each, the hidden ones
    last, and why the file could not be run at all, so that no other exercise need try.
    Whatever a submission does is an observation.  Raises: SandboxUnavailable.

    Where the numbers are not `theirs`, the reference's, every other assignment of the weights that
    the shapes allow is tried. With several `draws` a case that is not hidden is drawn again while
    an activation makes no difference to its numbers: who leaves it out shall be found whatever the
    draw. What was seen then names its seed.
    """
    cases = exercise.cases + exercise.unseen
    seen: list[Seen] = []
    loaded = False
    try:
        with contextlib.closing(Worker(host)) as worker:
            answer = _load(worker, exercise, filename, data, deadline)
            if "error" in answer:
                return [{"error": _clean(answer["error"])}] * len(cases), ""
            loaded = True
            for i, case in enumerate(cases):
                question = _question(case, seeds[i])
                if draws > 1 and case.probe == "observe" and i < len(exercise.cases):
                    answer = _drawn(worker, {**question, "careful": True}, draws)
                else:
                    answer = worker.ask(question, host.limits.case_seconds, deadline)
                if theirs is not None and case.probe == "observe":
                    answer = _arranged(worker, question, answer, theirs[i], deadline)
                seen.append({k: _clean(v) if k.endswith("error") else v for k, v in answer.items()})
                if str(answer.get("error", "")).startswith("not allowed"):
                    if i >= len(exercise.cases):  # its words could tell of a hidden case
                        seen[-1] = {"error": "not allowed: the submission changes torch or Python"}
                    return [seen[-1]] * len(cases), ""
            return seen, ""
    except WorkerLost as lost:
        message = str(lost) if loaded else f"while it was imported: {lost}"
        seen += [{"error": message}] * (len(cases) - len(seen))
        return seen, "" if loaded else message


def _load(
    worker: Worker, exercise: Exercise, filename: str, data: bytes, deadline: float = float("inf")
) -> dict[str, Any]:
    path = lesson_path(exercise.lesson).relative_to(ROOT)
    question = {
        "probe": "load",
        "filename": filename,
        "source": base64.b64encode(data).decode(),
        "parts": exercise.parts,
        "grafts": grafts(exercise, data.decode("utf-8", "replace")),
        "setup": exercise.setup,
        "reference": ".".join(path.with_suffix("").parts),
        "exercise": exercise.number,
    }
    return worker.ask(question, worker.limits.import_seconds, deadline)


def _question(case: Case, seed: int) -> dict[str, Any]:
    question = {"probe": case.probe, "expression": case.expression}
    if case.probe != "count":
        question["seed"] = seed
    if case.probe == "observe":
        question |= {"inputs": case.inputs, "as_list": case.as_list}
    return question


def _drawn(worker: Worker, question: dict[str, Any], draws: int) -> Seen:
    """The first of so many seeds with which no activation is silent, else the one with fewest."""
    looks = []
    for draw in range(draws):
        seed = question["seed"] + 1000 * draw
        answer = worker.ask({**question, "seed": seed}, worker.limits.case_seconds)
        looks.append({**answer, "seed": seed})
        if not answer.get("silent"):
            break
    return min(looks, key=lambda seen: len(seen.get("silent", ())))


def _arranged(
    worker: Worker, question: dict[str, Any], answer: Seen, theirs: Seen, deadline: float
) -> Seen:
    """The answer under the assignment of weights that gives the reference's numbers, if one does.

    Only where as many parameters and the right shapes leave nothing else to differ.
    """
    same = all(answer.get(key) == theirs[key] for key in ("parameters", "shapes"))
    whole = len(theirs["slots"]) > 60  # a net, of which the parts are the reference's own
    if whole or not same or "eval" not in answer or agree(answer["eval"], theirs["eval"]):
        return answer
    question = {**question, "slots": theirs["slots"]}
    seconds = worker.limits.case_seconds
    tried = worker.ask({**question, "probe": "arrange"}, 4 * seconds, deadline).get("tried")
    wanted = checks.sketch_of(theirs["eval"], SKETCH)
    for number, outputs in enumerate(tried if isinstance(tried, list) else ()):
        if agree(outputs, wanted):
            return worker.ask({**question, "arrangement": number}, seconds, deadline)
    return answer


def grafts(exercise: Exercise, text: str) -> dict[str, Any]:
    """What the worker needs of the reference beside the submission: its imports; other exercises'
    parts, to replace the submission's; and what the submission lacks. Compiled, so that no worker
    has the source of a solution, and only what this exercise's code and cases can reach.
    """
    imports, texts, codes = _reference(exercise.lesson)
    own = {part.split(".")[0] for part in exercise.parts}
    others = [e for e in exercises(exercise.lesson).values() if e.number != exercise.number]
    exercised = {part for e in others for part in e.parts} - own - {*exercise.parts}
    needed = _reach(exercise, own, text, texts)
    replaced, lacking = {}, {}
    for name, code in codes.items():
        if name in exercised and name.split(".")[0] in needed | own:
            replaced[name] = code
        if name in needed - own:
            lacking[name] = code
    told = sorted({part.split(".")[0] for e in others for part in e.parts} - own)
    return {"imports": imports, "replace": replaced, "lacking": lacking, "others": told}


@cache
def _reference(lesson: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """A lesson's imports; what each name is bound to, as text; the same compiled, and with it the
    methods that are an exercise, each in a class that has nothing else.
    """
    tree = ast.parse(lesson_path(lesson).read_text(encoding="utf-8"))
    imports = [ast.unparse(n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    named = definitions(tree.body)
    texts = {name: ast.unparse(node) for name, node in named.items()}
    codes = {name: _pack(node) for name, node in named.items()}
    for part in {part for e in exercises(lesson).values() for part in e.parts}:
        owner, _, method = part.partition(".")
        if method:
            (alone,) = ast.parse(f"class {owner}: ...").body
            alone.body = functions_of(tree, part)
            codes[part] = _pack(alone)
    return "\n".join(imports), texts, codes


def _pack(node: ast.stmt) -> str:
    """A statement as a worker gets it: bytecode without docstrings."""
    flags = __future__.annotations.compiler_flag
    module = ast.Module([node], [])
    code = compile(module, "<reference>", "exec", flags=flags, dont_inherit=True, optimize=2)
    return base64.b64encode(marshal.dumps(code)).decode()


_WORD = re.compile(r"[^\W\d]\w*")


def _reach(exercise: Exercise, own: set[str], text: str, known: dict[str, str]) -> set[str]:
    """Names of the reference (`known`) that the exercise's own code, its cases or anything of the
    submission's own making may use, directly or not. By words: a submission is not parsed here.
    """
    tried = [case.expression for case in exercise.cases + exercise.unseen]
    used = [exercise.setup, *tried, *(known.get(name, "") for name in own)]
    for block in re.split(r"^(?=[^\s#)\]}])", text, flags=re.MULTILINE):
        match = re.match(r"(?:class|def)\s+(\w+)", block)
        if match and (match[1] in own or match[1] not in known):
            used.append(block)
    reached: set[str] = set()
    while used:
        new = {word for piece in used for word in _WORD.findall(piece)} & known.keys() - reached
        reached |= new
        used = [known[name] for name in new - own]
    return reached


def _all_lost(exercise: Exercise, message: str) -> list[Result]:
    return [_result(row, message) for row in _rows(exercise)]


def _rows(exercise: Exercise) -> list[Worth]:
    return [row for row in worth((exercise.lesson,)) if row.exercise == exercise.number]


def _result(row: Worth, message: str, seconds: float = 0.0, share: float = 0.0) -> Result:
    return Result(
        exercise=row.exercise,
        check=row.check,
        title=exercises(row.lesson)[row.exercise].title,
        score=round(share * row.points, 2) if message else row.points,
        max_score=row.points,
        visibility=row.visibility,
        message=_clean(message),
        seconds=round(seconds, 3),
    )


def _clean(text: object) -> str:
    """Words of a submission, fit to print: no escape sequences, nothing that UTF-8 can't hold."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:MESSAGE_LIMIT]


def not_run(row: Worth, why: str = "the grader was stopped before, or told to skip it") -> Result:
    """The result of a line of the table that nothing was found out about."""
    return _result(row, f"not marked: {why}")
