"""The verdicts: what was seen of a submission against what was seen of the reference. Runs in the
parent, without torch.

A check takes one trial and raises `Wrong` with what a student needs to find the fault. Each is
worth its points on its own, so that a bias left on costs the count and the layers and leaves the
points for the rest.
"""

from __future__ import annotations

import base64
import difflib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.grading.exercises import Case

TOLERANCE = 1e-4  # of the largest value, or of 1


class Wrong(Exception):
    """What was expected and what came, in a line or two."""


@dataclass(frozen=True)
class Trial:
    """One case and what both sides made of it, as plain data from the workers."""

    case: Case
    mine: dict[str, Any]  # the submission's: untrusted
    theirs: dict[str, Any]  # the reference's
    asked: tuple[str, ...] = ()  # the exercise's checks


def shape(trial: Trial) -> None:
    """The module can be built, takes the input and gives tensors of the right shapes."""
    _must_run(trial)
    mine, theirs = trial.mine["shapes"], trial.theirs["shapes"]
    if mine != theirs:
        raise Wrong(f"the output's shape should be {_shapes(theirs)} and is {_shapes(mine)}")


def parameters(trial: Trial) -> None:
    """The exact number of parameters."""
    _must_build(trial)
    mine, theirs = trial.mine["parameters"], trial.theirs["parameters"]
    if mine != theirs:
        raise Wrong(f"expected {theirs:,} parameters, got {mine:,}; {layer_difference(trial)}")


def layers(trial: Trial) -> None:
    """The same layers with weights, in any order and under any names."""
    _must_build(trial)
    if difference := layer_difference(trial):
        raise Wrong(difference)


def values(trial: Trial) -> None:
    """The same numbers as the reference, from the same weights and the same random input, in eval
    and train mode. Dropout and its like drop the same on both sides.
    """
    _must_run(trial)
    mine, theirs = trial.mine, trial.theirs
    where = "with the reference's weights and the same input ({} mode), "
    _must_agree(mine["eval"], theirs["eval"], where.format("eval"))
    if not agree(mine.get("train_flipped"), theirs["train"]):
        _must_agree(mine["train"], theirs["train"], where.format("train"))


def gradients(trial: Trial) -> None:
    """Every parameter that the reference's output needs gets a gradient, and so does the input."""
    _must_run(trial)
    lost = trial.mine["no_gradient"]
    if len(lost) > len(trial.theirs["no_gradient"]):
        raise Wrong(
            f"no gradient reaches {_names(lost)}: unused in forward, detached, or stopped by a ReLU"
        )
    mine, theirs = (side["input_gradient"] for side in (trial.mine, trial.theirs))
    if len(mine) != len(theirs):
        raise Wrong("the answer makes no sense: as many gradients as inputs are expected")
    for got, wanted in zip(mine, theirs):
        if wanted is None:
            continue
        if got is None or not _array(got).any():
            raise Wrong("no gradient reaches the input: something is detached on the way")
        if got["$tensor"][1] != wanted["$tensor"][1] or len(_array(got)) != len(_array(wanted)):
            raise Wrong("the gradient of the input has another shape than the input")


def modes(trial: Trial) -> None:
    """train() and eval() differ where they should (BatchNorm, dropout), and nowhere else."""
    _must_run(trial)
    mine, theirs = trial.mine, trial.theirs
    same, differ = "gives the same output", "gives another output"
    wanted, came = (same, differ) if theirs["train_is_eval"] else (differ, same)
    for wrong, text in (
        (not mine["eval_repeats"],
         "two passes in eval mode give different outputs: something random stays on (dropout?)"),
        (mine["eval_changes"], f"a pass in eval mode changes {_names(mine['eval_changes'])}"),
        (mine["train_repeats"] and not theirs["train_repeats"],
         "nothing is random in train mode: dropout or stochastic depth is missing or always off"),
        (theirs["train_repeats"] and not mine["train_repeats"],
         "two passes in train mode differ: something is random that should not be"),
        (mine["train_is_eval"] != theirs["train_is_eval"],
         f"train mode {came} as eval mode, where the reference {wanted}: see BatchNorm, dropout"),
        ((mine["train_changes"] == 0) != (theirs["train_changes"] == 0),
         "a pass in train mode should update BatchNorm's statistics where the reference does"),
    ):  # fmt: skip
        if wrong:
            raise Wrong(text)


def identity(trial: Trial) -> None:
    """With every weight at zero, only what bypasses the weights is left: the shortcut."""
    _must_run(trial)
    where = "with every weight at zero, only the shortcut is left, but "
    _must_agree(trial.mine["zero"], trial.theirs["zero"], where)


def initial(trial: Trial) -> None:
    """Fresh weights have the mean and the spread of the reference's: the initialisation ran."""
    _must_build(trial)
    mine, theirs = _by_size(trial.mine["initial"]), _by_size(trial.theirs["initial"])
    for size, wanted in theirs.items():
        if len(mine.get(size, ())) != len(wanted):
            raise Wrong(f"a {wanted[0][0]} is missing, whose fresh weights are looked at")
        for (text, got), (_, right) in zip(mine[size], wanted):
            for role, a, b in zip(("weights", "biases"), got, right):
                if not _alike(a, b):
                    raise Wrong(
                        f"the fresh {role} of a {text} have mean {a[1]:.3g} and spread {a[2]:.3g}, "
                        f"where the lesson's have {b[1]:.3g} and {b[2]:.3g}: is the initialisation "
                        "called, last, and told what it asks for?"
                    )


def _by_size(layers: list[list]) -> dict[str, list]:
    found: dict[str, list] = {}
    for text, size, numbers in layers:
        found.setdefault(size, []).append((text, numbers))
    return {
        size: sorted(group, key=lambda layer: [x[2] for x in layer[1]])
        for size, group in found.items()
    }


def _alike(a: list[float], b: list[float]) -> bool:
    """Whether two samples (count, mean, spread) may come from one distribution: five sigma."""
    count, mean, spread = b
    if spread == 0 or a[2] == 0:
        return bool(np.isclose(a[1], mean, atol=1e-6) and np.isclose(a[2], spread, atol=1e-6))
    slack = 0.1 + 5 / math.sqrt(count)
    return abs(math.log(a[2] / spread)) < slack and abs(a[1] - mean) < slack * max(spread, a[2])


def result(trial: Trial) -> None:
    """The expression's value."""
    _must_build(trial)
    if difference := value_difference(trial.mine["value"], trial.theirs["value"]):
        raise Wrong(difference)


def unseen(trial: Trial) -> None:
    """Shape, parameters, layers, values and result, as far as the exercise asks for them, on sizes
    that the assignment does not print.
    """
    for check in (shape, parameters, layers, values, result):
        if check.__name__ in trial.asked and trials_of(check.__name__, [trial], []):
            check(trial)


_ALL = (shape, parameters, layers, values, gradients, modes, identity, initial, result, unseen)
CHECKS: dict[str, Callable[[Trial], None]] = {check.__name__: check for check in _ALL}
ALL_CASES = ("not done yet", "missing", "not allowed", "not readable", "syntax error",
             "while it was imported")  # said without a case  # fmt: skip


def trials_of(check: str, trials: list[Trial], hidden: list[Trial]) -> list[Trial]:
    """The trials that `check` is about, of the exercise's visible and its hidden ones."""
    if check == "unseen":
        return hidden
    probes = {"result": "evaluate", "parameters": "count observe", "layers": "count observe"}
    return [t for t in trials if t.case.probe in probes.get(check, "observe").split()]


def failures(check: str, trials: list[Trial]) -> list[tuple[Trial, str]]:
    """What is wrong with each trial that fails, in words.

    What the worker sent may be anything, so any error on the way is the submission's.
    """
    found = []
    for trial in trials:
        try:
            CHECKS[check](trial)
        except Wrong as wrong:
            found.append((trial, str(wrong)))
        except Exception:
            found.append((trial, "the answer makes no sense; does the submission change torch?"))
    return found


def agree(mine: Any, theirs: Any) -> bool:
    """Whether two lists of tensors, as they were sent, are the same numbers."""
    try:
        _must_agree(mine, theirs, "")
    except (Wrong, KeyError, TypeError, ValueError):
        return False
    return len(theirs) > 0


def sketch_of(tensors: list[dict], most: int) -> list[dict]:
    """The same sample of a sample that a worker makes."""
    thin = []
    for item in tensors:
        kind, shape, _ = item["$tensor"]
        numbers = _array(item)
        numbers = numbers[:: -(-len(numbers) // most) or 1]
        thin.append({"$tensor": [kind, shape, base64.b64encode(numbers.tobytes()).decode()]})
    return thin


def _must_build(trial: Trial) -> None:
    if "error" in trial.mine:
        raise Wrong(trial.mine["error"])


def _must_run(trial: Trial) -> None:
    _must_build(trial)
    if "forward_error" in trial.mine:
        raise Wrong(f"forward fails: {trial.mine['forward_error']}")


def _shapes(shapes: list[list[int]]) -> str:
    return " and ".join(str(tuple(shape)) for shape in shapes)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(str, names[:4])) + more


def _array(encoded: dict) -> np.ndarray:
    """The numbers of a tensor. A worker that plays by the rules sends two types only."""
    kind, _, data = encoded["$tensor"]
    if kind not in ("float64", "int64"):
        raise ValueError(kind)
    return np.frombuffer(base64.b64decode(data), dtype=kind)


def _must_agree(mine: list[dict], theirs: list[dict], where: str) -> None:
    if len(mine) != len(theirs):
        raise Wrong(f"{where}{len(theirs)} output tensors are expected, and {len(mine)} came")
    for got, wanted in zip(mine, theirs):
        _must_equal(got, wanted, where)


def _must_equal(got: dict, wanted: dict, where: str = "") -> None:
    a, b, shape, right = _array(got), _array(wanted), got["$tensor"][1], wanted["$tensor"][1]
    if shape != right or a.shape != b.shape:
        raise Wrong(f"{where}the shape is {tuple(shape)} and should be {tuple(right)}")
    if not np.isfinite(a).all():
        raise Wrong(f"{where}the output has infinite or undefined numbers")
    far, largest = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
    scale = max(1.0, largest)
    if far <= TOLERANCE * scale:
        return
    text = f"{where}the output is off by up to {far:.3g}, where values reach {largest:.3g}"
    if np.ptp(a) == 0 < np.ptp(b):
        text += f"; every number is {a.flat[0]:.3g}: it does not depend on the input"
    elif np.allclose(np.maximum(a, 0), b, atol=TOLERANCE * scale):
        text += "; it would be right after a ReLU: the last one is missing"
    elif np.allclose(np.maximum(b, 0), a, atol=TOLERANCE * scale):
        text += "; there is a ReLU at the end that should not be"
    else:
        text += _scaled(a, b, scale)
    raise Wrong(text)


def _scaled(a: np.ndarray, b: np.ndarray, scale: float) -> str:
    """Whether one is a multiple of the other, or off by a constant."""
    if not a.any():
        return ""
    factor = float(a @ b / (a @ a))
    if factor and np.allclose(factor * a, b, atol=TOLERANCE * scale):
        share = f"1/{factor:.4g} of" if abs(factor) > 1 else f"{1 / factor:.4g} times"
        return f"; it is {share} what it should be"
    shift = float((b - a).mean())
    if np.allclose(a + shift, b, atol=TOLERANCE * scale):
        return f"; {shift:.3g} is missing in every place"
    return ""


def layer_difference(trial: Trial) -> str:
    """In words: what is different, missing or too many, by the student's names.

    Layers are paired by place: what stands between the same two neighbours belongs together.
    """
    mine = [(str(name), str(text)) for name, text in trial.mine["layers"]]
    theirs = [str(text) for _, text in trial.theirs["layers"]]
    texts = [text for _, text in mine]
    if sorted(texts) == sorted(theirs):
        return ""
    pairs: list[tuple[tuple[str, str], str]] = []
    extra: list[tuple[str, str]] = []
    missing: list[str] = []
    steps = difflib.SequenceMatcher(None, texts, theirs, autojunk=False).get_opcodes()
    for (_, i, j, k, m), (_, _, end, _, _) in zip(steps, [*steps[1:], steps[-1]]):
        while k == m and j < end and texts[i] == texts[j]:  # too many are the last that repeat
            i, j = i + 1, j + 1
        # The same number in the same gap: one for one. Else the same kind of layer, in order.
        if j - i == m - k:
            pairs += zip(mine[i:j], theirs[k:m])
        else:
            paired, more, less = _by_kind(mine[i:j], theirs[k:m])
            pairs, extra, missing = pairs + paired, extra + more, missing + less
    parted, extra, missing = _by_kind(extra, missing)  # by what stands between them
    lines = [
        f"{name} is a {text}; expected {wanted}"
        for (name, text), wanted in pairs + parted
        if text != wanted
    ]
    lines += [
        f"there is no {text}" + (f", {times} times" if times > 1 else "")
        for text, times in Counter(missing).items()
    ]
    lines += [f"too many: {name}, a {text}" for name, text in extra]
    more = f"; and {len(lines) - 3} more differences" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _by_kind(
    ours: list[tuple[str, str]], wanted: list[str]
) -> tuple[list[tuple[tuple[str, str], str]], list[tuple[str, str]], list[str]]:
    """Pairs of equal layers, then of a kind in their order; and what is left on both sides."""
    pairs, more, left = [], list(ours), list(wanted)
    for key in (str, _kind):
        for layer in list(more):
            partner = next((text for text in left if key(text) == key(layer[1])), None)
            if partner is not None:
                pairs.append((layer, partner))
                more.remove(layer)
                left.remove(partner)
    return pairs, more, left


def _kind(text: str) -> str:
    """'BatchNorm2d' or 'convolution' of a layer in words."""
    return "convolution" if "convolution" in text else text.split()[0]


def value_difference(mine: Any, theirs: Any) -> str:
    """'' if two values of plain data agree (floats to 1e-6), else what was expected."""
    difference = f"expected {_short(theirs)}, got {_short(mine)}"
    if _is_tensor(theirs) and _is_tensor(mine):
        try:
            _must_equal(mine, theirs)
        except Wrong as wrong:
            return str(wrong)
        return ""
    several = isinstance(theirs, (dict, list)) and not _is_tensor(theirs)
    if several and type(mine) is type(theirs) and len(mine) == len(theirs):
        for key in theirs if isinstance(theirs, dict) else range(len(theirs)):
            if isinstance(theirs, dict) and key not in mine:
                return f"{key} is missing from {_short(mine)}"
            inner = value_difference(mine[key], theirs[key])
            if inner:  # tensors: the numbers themselves say little
                return f"part {key}: {inner}" if "$tensor" in str(theirs) else difference
        return ""
    if isinstance(theirs, float) and isinstance(mine, (int, float)) and not isinstance(mine, bool):
        close = np.isclose(mine, theirs, rtol=1e-6, atol=1e-9)
        return "" if close else f"expected {theirs:g}, got {mine:g}"
    same = isinstance(theirs, bool) == isinstance(mine, bool) and mine == theirs
    return "" if same else difference


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and "$tensor" in value


def _short(value: Any) -> str:
    text = f"a tensor of shape {tuple(value['$tensor'][1])}" if _is_tensor(value) else repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
