"""Marking: a submission's source goes into workers, their observations become points.

Scores are made here, in the grader's own process, out of the table `points.csv` and of observations
that workers send (`sandbox`). Every line of the table gives exactly one result, whatever the
submission does, so that the total never changes.
"""

from __future__ import annotations
import __future__

import ast
import base64
import hashlib
import json
import marshal
import re
import secrets
import stat
import threading
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.grading.checks import (
    ALL_CASES,
    Trial,
    agree,
    failures,
    layer_difference,
    sketch_of,
    trials_of,
    value_difference,
)
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
from common.grading.holes import functions_of, put_in
from common.grading.sandbox import Host, Limits, Worker, WorkerLost

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SOURCE_LIMIT = (
    1 << 20
)  # bytes of a submitted file; of a notebook, with its pictures, ten times that
MARKED = (".py", ".ipynb")
PACKED = (".zip", ".gz", ".tgz", ".tar", ".7z", ".rar", ".xz", ".bz2")
MESSAGE_LIMIT = 1000  # characters of one result's message
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

        Args:
            only: no other lesson is marked, so that a file of any name can be meant.

        Raises: ValueError, with a line for the student, if there is no such file or it can't be
            taken.
        """
        wanted = file_name(lesson)
        if self.path.is_symlink():
            raise ValueError(f"{self.path.name} is a link; links are not followed")
        if self.path.resolve() == ROOT:  # the lessons themselves
            return wanted, lesson_path(lesson).read_bytes()
        if not self.path.is_dir():
            candidates = [self.path]
        else:
            everything = sorted(
                p for p in self.path.rglob("*") if not is_hidden(p.relative_to(self.path))
            )
            files = [p for p in everything if p.suffix.lower() in MARKED]
            stem = Path(wanted).stem.lower()
            candidates = [p for p in files if p.stem.lower() == stem]
            candidates = candidates or [p for p in files if re.match(rf"{lesson}\D", p.name)]
            if not candidates and only and len(files) == 1:
                candidates = files
            # A notebook beside the script that was made of it, or the other way round.
            scripts = [p for p in candidates if p.suffix.lower() == ".py"]
            candidates = scripts or candidates
            if not candidates:
                packed = [p.name for p in everything if p.suffix.lower() in PACKED]
                names = ", ".join(p.name for p in files[:5])
                there = f"there is {names}" if names else "there is no .py file at all"
                if packed:
                    there = f"{packed[0]} is not unpacked: hand in the files themselves"
                raise ValueError(f"missing file: no {wanted}; {there}")
        if len(candidates) > 1:
            places = ", ".join(str(p.relative_to(self.path)) for p in candidates[:3])
            raise ValueError(f"more than one file for lesson {lesson}: {places}; leave one")
        path = candidates[0]
        suffix = path.suffix.lower()
        if suffix in PACKED:
            raise ValueError(f"{path.name} is not unpacked: hand in the .py or .ipynb file itself")
        data = _read(path)
        return (path.name, code_of_notebook(path.name, data) if suffix == ".ipynb" else data)

    def lesson(self) -> str | None:
        """The lesson that a lone file belongs to, by its name or else by what it defines."""
        match = re.match(r"\d\d(?=\D)", self.path.name)
        if match and match.group() in manifests():
            return match.group()
        try:
            data = _read(self.path)
            if self.path.suffix.lower() == ".ipynb":
                data = code_of_notebook(self.path.name, data)
            text = data.decode("utf-8", "replace")
        except ValueError:
            return None
        defined = set(re.findall(r"^(?:class|def)\s+(\w+)", text, re.MULTILINE))
        wanted = {
            lesson: {part.split(".")[0] for e in exercises(lesson).values() for part in e.parts}
            for lesson in manifests()
        }
        best = max(wanted, key=lambda lesson: len(defined & wanted[lesson]))
        return best if defined & wanted[best] else None

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
    lines: list[str] = []
    for number, text in enumerate(texts, 1):
        lines.append(f"# %% code cell {number}")
        if text.lstrip().startswith("%%"):  # another language, as a rule
            lines += [f"# {line}" for line in text.splitlines()]
        else:
            lines += [re.sub(r"^(\s*)([%!].*)$", r"\1pass  # \2", x) for x in text.splitlines()]
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _read(path: Path) -> bytes:
    """The bytes of a plain file. A link may point anywhere and a pipe never ends, so neither is
    opened.
    """
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is not a plain file (links are not followed)")
        limit = SOURCE_LIMIT * (10 if path.suffix.lower() == ".ipynb" else 1)
        if status.st_size > limit:
            raise ValueError(f"{path.name} is larger than {limit >> 20} MB")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} can't be read: {error.strerror}") from None


# ----------------------------------------------------------------------------------------- marking


class Grader:
    """Marks submissions one after another. Use as a context manager: it keeps a host process warm.

    Args:
        lessons: what will be marked.
        limits: for each worker.
        references: shared by the graders of a class, so that the reference is observed once.
    """

    def __init__(
        self,
        lessons: Iterable[str],
        limits: Limits | None = None,
        references: References | None = None,
    ) -> None:
        self.lessons = tuple(lessons)
        self.references = references or References()
        self.host = Host(preload_modules(self.lessons), limits or Limits())
        self.files: dict[tuple[str, bytes], _File] = {}

    def __enter__(self) -> Grader:
        return self

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
        key = exercise.lesson, hashlib.sha256(data).digest()
        file = self.files.setdefault(key, _File(self.host.limits.lesson_seconds))
        if not file.hopeless and file.seconds_left <= 0:
            file.hopeless = "not marked: the time for the whole lesson is used up"
        if file.hopeless:
            return _all_lost(exercise, file.hopeless)
        theirs = self.references.get(exercise, self.host)
        started = time.monotonic()
        deadline = started + file.seconds_left
        mine = observe(
            self.host, exercise, filename, data, theirs.seed, deadline, theirs=theirs.seen
        )
        file.hopeless = mine.hopeless
        results = self._judge(exercise, mine.seen, theirs, started)
        file.seconds_left -= time.monotonic() - started
        return results

    def _judge(
        self, exercise: Exercise, mine: list[dict], theirs: Observed, started: float
    ) -> list[Result]:
        rows = _rows(exercise)
        asked = tuple(row.check for row in rows)
        cases = exercise.cases + exercise.unseen
        trials = [Trial(case, m, t, asked) for case, m, t in zip(cases, mine, theirs.seen)]
        visible, hidden = trials[: len(exercise.cases)], trials[len(exercise.cases) :]
        results = []
        for row in rows:
            about = trials_of(row.check, visible, hidden)
            failed = failures(row.check, about)
            share = 1.0 if not failed else 0.0
            if row.check == "result":  # each case is worth its share
                share = 1 - len(failed) / len(about)
            message = ""
            if failed:
                trial, text = failed[0]
                message = text
                if not text.startswith(ALL_CASES):
                    name = ""
                    if "ReLU" not in text:  # else the check itself has said it
                        name = self.references.name(exercise, trial, row.check, self.host)
                    message = text if not name else f"{text}; likely: {name}"
                    place = str(trial.case)
                    if row.check == "unseen":
                        place = f"a case that is not printed (of the kind: {exercise.kind})"
                    message = f"{place}: {message}"
                if share and len(about) > 1:
                    message = f"{len(failed)} of {len(about)} cases fail; {message}"
            seconds = (time.monotonic() - started) / len(rows)
            results.append(_result(exercise, row, message, seconds, share))
        return results


@dataclass
class _File:
    """What is known of one submitted file from the exercises marked before."""

    seconds_left: float
    hopeless: str = ""  # why it can't be run at all


class References:
    """What the reference lessons do, observed once for each exercise, with numbers that no student
    can foresee; and what they would do with known mistakes in them.
    """

    DRAWS = 20  # seeds to try until each activation matters

    def __init__(self, seed: int | None = None) -> None:
        self.seed = secrets.randbits(31) if seed is None else seed
        self._seen: dict[str, Observed] = {}
        self._manifest: dict[str, list[tuple[str, list[dict]]]] = {}
        self._mutants: dict[tuple[str, str], list[tuple[str, dict]]] = {}
        self._lock = threading.RLock()

    def get(self, exercise: Exercise, host: Host) -> Observed:
        """Raises: RuntimeError, if the lesson itself fails: then nobody can be marked."""
        with self._lock:
            if exercise.number not in self._seen:
                self._seen[exercise.number] = self._look(exercise, host)
            return self._seen[exercise.number]

    def _look(self, exercise: Exercise, host: Host) -> Observed:
        """Drawn again, if an activation makes no difference to the numbers that were drawn: who
        leaves it out shall be found whatever the draw.
        """
        path = lesson_path(exercise.lesson)
        best, fewest = None, 0
        for draw in range(self.DRAWS):
            found = observe(
                host, exercise, path.name, path.read_bytes(), self.seed + 1000 * draw, careful=True
            )
            for case, observation in zip(exercise.cases + exercise.unseen, found.seen):
                error = observation.get("error") or observation.get("forward_error")
                if error:
                    raise RuntimeError(
                        f"exercise {exercise.number}, the reference itself: {case}: {error}"
                    )
            visible = found.seen[: len(exercise.cases)]
            silent = sum(len(observation.get("silent", ())) for observation in visible)
            if best is None or silent < fewest:
                best, fewest = found, silent
            if not silent:
                break
        return best

    def name(self, exercise: Exercise, trial: Trial, check: str, host: Host) -> str:
        """The likely mistake: the one known that gives what the submission gave; else ''."""
        try:
            return self._name(exercise, trial, check, host)
        except Exception:  # what a worker sent may be anything
            return ""

    def _name(self, exercise: Exercise, trial: Trial, check: str, host: Host) -> str:
        if "error" in trial.mine or "forward_error" in trial.mine:
            return ""
        # With other layers than the reference's, no mistake in the reference's can explain it.
        mutate = trial.case.probe == "observe" and not layer_difference(trial)
        for name, theirs in self._known(exercise, trial, host, mutate):
            if _explains(trial, check, theirs):
                return name
        same = mutate and agree(trial.mine.get("eval", ()), trial.theirs["eval"])
        if same and check in ("values", "unseen"):
            return "right in eval mode, not in train mode: dropout (rate, place) or BatchNorm"
        return ""

    def _known(
        self, exercise: Exercise, trial: Trial, host: Host, mutate: bool
    ) -> Iterator[tuple[str, dict]]:
        """The manifest's mistakes, then with `mutate` those that `mutants` makes; each in words,
        and what is seen of the trial's case with it.
        """
        number, text = exercise.number, str(trial.case)
        cases = [str(case) for case in exercise.cases + exercise.unseen]
        place = cases.index(text)
        with self._lock:
            seed = self.get(exercise, host).seed
            if number not in self._manifest:
                self._manifest[number] = manifest_mistakes(host, exercise, seed)
            yield from ((name, seen[place]) for name, seen in self._manifest[number])
            if mutate and (number, text) not in self._mutants:
                self._mutants[number, text] = made_mistakes(host, exercise, place, seed)
            if mutate:
                yield from self._mutants[number, text]


def _explains(trial: Trial, check: str, known: dict[str, Any]) -> bool:
    """Whether a known mistake gives what the submission gave and the reference doesn't."""
    mine, theirs = trial.mine, trial.theirs
    if trial.case.probe == "evaluate":
        return "value" in known and not value_difference(mine["value"], known["value"])
    if trial.case.probe == "count":
        return known.get("parameters") == mine["parameters"] != theirs["parameters"]
    if "sketch" not in known:  # a whole observation, of the manifest's mistakes
        if not agree(mine["eval"], known.get("eval", ())):
            return False
        if not agree(mine["eval"], theirs["eval"]):
            return True
        return agree(mine["train"], known["train"]) and not agree(mine["train"], theirs["train"])
    evaluated, trained = known["sketch"]
    if check == "identity" and agree(mine["eval"], theirs["eval"]):
        return False
    if not agree(sketch_of(mine["eval"], SKETCH), evaluated):
        return False
    if not agree(mine["eval"], theirs["eval"]):
        return True
    if trained is None or agree(mine["train"], theirs["train"]):
        return False
    return any(
        agree(sketch_of(mine[which], SKETCH), trained)
        for which in ("train", "train_flipped")
        if which in mine
    )


def manifest_mistakes(
    host: Host, exercise: Exercise, seed: int
) -> list[tuple[str, list[dict[str, Any]]]]:
    """What is seen of each case with the wrong code that the manifest has."""
    path = lesson_path(exercise.lesson)
    source = path.read_text(encoding="utf-8")
    aided = replace(exercise, setup=f"{exercise.setup}\n{exercise.aids}")
    return [
        (name, observe(host, aided, path.name, put_in(source, code).encode(), seed).seen)
        for name, code in exercise.mistakes
    ]


def made_mistakes(
    host: Host, exercise: Exercise, place: int, seed: int
) -> list[tuple[str, dict[str, Any]]]:
    """What comes out of one case with one step of the reference's done wrong."""
    path = lesson_path(exercise.lesson)
    question = _question((exercise.cases + exercise.unseen)[place], seed + place)
    try:
        with Worker(host) as worker:
            _load(worker, exercise, path.name, path.read_bytes())
            answer = worker.ask({**question, "probe": "mistakes"}, 4 * host.limits.case_seconds)
    except WorkerLost:
        return []  # a mistake without a name is still a mistake
    return [
        (name, {"sketch": (evaluated, trained)})
        for name, evaluated, trained in answer.get("mistakes", ())
    ]


@dataclass(frozen=True)
class Observed:
    """One observation per case of the exercise, the hidden ones last."""

    seen: list[dict[str, Any]]
    seed: int
    hopeless: str = (
        ""  # not empty: the file could not be run at all, and no other exercise need try
    )


def observe(
    host: Host,
    exercise: Exercise,
    filename: str,
    data: bytes,
    seed: int,
    deadline: float = float("inf"),
    theirs: list[dict[str, Any]] | None = None,
    careful: bool = False,
) -> Observed:
    """Try all cases of one exercise in a worker of its own. Never raises: whatever goes wrong is an
    observation.

    Args:
        theirs: what was seen of the reference: where the numbers differ, every other assignment of
            the weights that the shapes allow is tried.
        careful: see `probes`.
    """
    cases = exercise.cases + exercise.unseen
    seen: list[dict[str, Any]] = []
    loaded = False
    try:
        with Worker(host) as worker:
            answer = _load(worker, exercise, filename, data, deadline)
            if "error" in answer:
                return Observed([{"error": _clean(answer["error"])}] * len(cases), seed)
            loaded = True
            for i, case in enumerate(cases):
                question = _question(case, seed + i)
                if case.probe == "observe":
                    question["careful"] = careful
                answer = worker.ask(question, host.limits.case_seconds, deadline)
                if theirs is not None and case.probe == "observe":
                    answer = _arranged(worker, question, answer, theirs[i], host, deadline)
                seen.append({k: _clean(v) if k.endswith("error") else v for k, v in answer.items()})
                if str(answer.get("error", "")).startswith(("not done yet", "not allowed")):
                    return Observed([seen[-1]] * len(cases), seed)
            return Observed(seen, seed)
    except WorkerLost as lost:
        message = str(lost) if loaded else f"while it was imported: {lost}"
        if lost.kind == "death" and worker.text().strip():
            message += f"; the last it printed: {_clean(worker.text().strip())[-200:]}"
        seen += [{"error": message}] * (len(cases) - len(seen))
        return Observed(seen, seed, hopeless="" if loaded else message)


def _load(
    worker: Worker,
    exercise: Exercise,
    filename: str,
    data: bytes,
    deadline: float = float("inf"),
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
    question: dict[str, Any] = {"probe": case.probe, "expression": case.expression}
    if case.probe != "count":
        question["seed"] = seed
    if case.probe == "observe":
        question |= {"inputs": case.inputs, "as_list": case.as_list}
    return question


def _arranged(
    worker: Worker,
    question: dict[str, Any],
    answer: dict[str, Any],
    theirs: dict[str, Any],
    host: Host,
    deadline: float,
) -> dict[str, Any]:
    """The answer under the assignment of weights that gives the reference's numbers, if one does.

    Only where as many parameters and the right shapes leave nothing else to differ.
    """
    same = all(answer.get(key) == theirs[key] for key in ("parameters", "shapes"))
    if not same or "eval" not in answer or agree(answer["eval"], theirs["eval"]):
        return answer
    if len(theirs["slots"]) > 60:
        return answer  # of a whole net the parts are the reference's own
    slots = {"slots": theirs["slots"]}
    asked = {k: v for k, v in question.items() if k != "careful"}
    tried = worker.ask(
        {**asked, **slots, "probe": "arrange"}, 4 * host.limits.case_seconds, deadline
    )
    wanted = sketch_of(theirs["eval"], SKETCH)
    outputs_tried = tried.get("tried")
    for number, outputs in enumerate(outputs_tried if isinstance(outputs_tried, list) else ()):
        if agree(outputs, wanted):
            question = {**question, **slots, "arrangement": number}
            return worker.ask(question, host.limits.case_seconds, deadline)
    return answer


def grafts(exercise: Exercise, text: str) -> dict[str, Any]:
    """What the worker needs of the reference beside the submission: its imports; other exercises'
    parts, to replace the submission's; and what the submission lacks. Compiled, so that no worker
    has the source of a solution, and only what this exercise's code and cases can reach.
    """
    reference = _reference(exercise.lesson)
    own = {part.split(".")[0] for part in exercise.parts}
    exercised = {
        part
        for e in exercises(exercise.lesson).values()
        if e.number != exercise.number
        for part in e.parts
    }
    needed = _reach(exercise, text, reference)
    replaced = {
        name: code
        for name, code in reference.code.items()
        if name in exercised and name.split(".")[0] in needed | own and name not in own
        and name not in exercise.parts
    }  # fmt: skip
    lacking = {
        name: code
        for name, code in reference.code.items()
        if name in needed - own and "." not in name
    }
    return {"imports": reference.imports, "replace": replaced, "lacking": lacking}


@dataclass(frozen=True)
class _Reference:
    """A lesson in pieces: what each name is bound to, as text and compiled."""

    imports: str
    text: dict[str, str]
    code: dict[str, str]


@cache
def _reference(lesson: str) -> _Reference:
    tree = ast.parse(lesson_path(lesson).read_text(encoding="utf-8"))
    parts = {part for e in exercises(lesson).values() for part in e.parts}
    imports, text, code = [], {}, {}
    for node in tree.body:
        names = []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(ast.unparse(node))
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [t.id for t in targets if isinstance(t, ast.Name)]
        for name in names:
            text[name], code[name] = ast.unparse(node), _pack(node)
        if isinstance(node, ast.ClassDef):
            for part in parts:
                owner, _, method = part.partition(".")
                if owner == node.name and method:
                    (function,) = functions_of(tree, part)
                    alone = ast.ClassDef(owner, [], [], [function], [])
                    alone.type_params = []
                    code[part] = _pack(ast.fix_missing_locations(alone))
    return _Reference("\n".join(imports), text, code)


def _pack(node: ast.stmt) -> str:
    """A statement as a worker gets it: bytecode without docstrings."""
    flags = __future__.annotations.compiler_flag
    module = ast.Module([node], [])
    code = compile(module, "<reference>", "exec", flags=flags, dont_inherit=True, optimize=2)
    return base64.b64encode(marshal.dumps(code)).decode()


_WORD = re.compile(r"[^\W\d]\w*")


def _reach(exercise: Exercise, text: str, reference: _Reference) -> set[str]:
    """Names of the reference that the exercise's code, its cases or anything of the submission's
    own making may use, directly or not. By words: a submission is not parsed here.
    """
    own = {part.split(".")[0] for part in exercise.parts}
    cases = exercise.cases + exercise.unseen
    words = set(_WORD.findall(" ".join([exercise.setup, *(case.expression for case in cases)])))
    for block in re.split(r"^(?=[^\s#)\]}])", text, flags=re.MULTILINE):
        match = re.match(r"(?:class|def)\s+(\w+)", block)
        if match and (match[1] in own or match[1] not in reference.text):
            words |= set(_WORD.findall(block))
    words |= {word for name in own for word in _WORD.findall(reference.text.get(name, ""))}
    reached: set[str] = set()
    queue = [word for word in words if word in reference.text]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            if name not in own:
                found = _WORD.findall(reference.text[name])
                queue += [word for word in found if word in reference.text]
    return reached


def preload_modules(lessons: Iterable[str]) -> tuple[str, ...]:
    """What these lessons import, for the host to import once. Not the lessons themselves."""
    # The first step of any optimizer imports torch._dynamo, which takes more than a second.
    names = dict.fromkeys(["torch", "torch._dynamo", "numpy", "common.grading.probes"])
    for lesson in lessons:
        for node in ast.parse(lesson_path(lesson).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names.update({alias.name: None for alias in node.names})
            elif isinstance(node, ast.ImportFrom) and node.module and node.module != "common":
                names[node.module] = None
            elif isinstance(node, ast.ImportFrom) and node.module == "common":
                names.update({f"common.{alias.name}": None for alias in node.names})
    return tuple(names)


def _all_lost(exercise: Exercise, message: str) -> list[Result]:
    return [_result(exercise, row, message) for row in _rows(exercise)]


def _rows(exercise: Exercise) -> list[Worth]:
    return [row for row in worth((exercise.lesson,)) if row.exercise == exercise.number]


def _result(
    exercise: Exercise, row: Worth, message: str, seconds: float = 0.0, share: float = 0.0
) -> Result:
    return Result(
        exercise=row.exercise,
        check=row.check,
        title=exercise.title,
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
    exercise = exercises(row.lesson)[row.exercise]
    return _result(exercise, row, f"not marked: {why}")
