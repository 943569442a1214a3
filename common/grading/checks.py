"""The verdicts: what was seen of a submission against what was seen of the reference. Runs in the
parent, without torch.

A check takes one trial and raises `Wrong` with what a student needs to find the fault. Each is
worth its points on its own, so that a bias left on costs the count and the layers and leaves the
points for the rest.
"""

from __future__ import annotations

import base64
import difflib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

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
        raise Wrong(f"expected {theirs:,} parameters, got {mine:,}; {_layer_difference(trial)}")


def layers(trial: Trial) -> None:
    """The same layers with weights, in any order and under any names."""
    _must_build(trial)
    difference = _layer_difference(trial)
    if difference:
        raise Wrong(difference)


def values(trial: Trial) -> None:
    """The same numbers as the reference, from the same weights and the same random input, in eval
    and train mode.
    """
    _must_run(trial)
    for mode in ("eval", "train"):
        if mode == "train" and not trial.theirs["train_repeats"]:
            break  # dropout: no two passes agree, of the reference neither
        mine, theirs = _arrays(trial.mine[mode]), _arrays(trial.theirs[mode])
        if len(mine) != len(theirs):
            raise Wrong(f"{len(theirs)} output tensors expected in {mode} mode, got {len(mine)}")
        for got, wanted in zip(mine, theirs):
            _must_equal(
                got, wanted, f"with the reference's weights and the same input ({mode} mode), "
            )


def gradients(trial: Trial) -> None:
    """Every parameter that takes part in the reference's output gets a gradient, and so does the
    input.
    """
    _must_run(trial)
    lost = trial.mine["no_gradient"]
    if len(lost) > len(trial.theirs["no_gradient"]):
        raise Wrong(
            f"no gradient reaches {_names(lost)}: unused in forward, detached, or stopped by a ReLU"
        )
    mine, theirs = (side["input_gradient"] for side in (trial.mine, trial.theirs))
    for got, wanted in zip(mine, theirs):
        if wanted is not None and (got is None or not _array(got).any()):
            raise Wrong("no gradient reaches the input: something is detached on the way")


def modes(trial: Trial) -> None:
    """train() and eval() differ where they should (BatchNorm, dropout), and nowhere else."""
    _must_run(trial)
    mine, theirs = trial.mine, trial.theirs
    if not mine["eval_repeats"]:
        raise Wrong(
            "two passes in eval mode give different outputs: something random stays on (dropout?)"
        )
    if mine["eval_changes"]:
        raise Wrong(f"a pass in eval mode changes {_names(mine['eval_changes'])}")
    if mine["train_repeats"] and not theirs["train_repeats"]:
        raise Wrong(
            "nothing is random in train mode: dropout or stochastic depth is missing or always off"
        )
    if theirs["train_repeats"] and not mine["train_repeats"]:
        raise Wrong("two passes in train mode differ: something is random that should not be")
    if mine["train_is_eval"] != theirs["train_is_eval"]:
        same, differ = "gives the same output", "gives another output"
        wanted, came = (same, differ) if theirs["train_is_eval"] else (differ, same)
        raise Wrong(
            f"train mode {came} as eval mode, where the reference {wanted}: see BatchNorm, dropout"
        )
    if (mine["train_changes"] == 0) != (theirs["train_changes"] == 0):
        raise Wrong(
            "a pass in train mode should update BatchNorm's statistics where the reference does"
        )


def identity(trial: Trial) -> None:
    """With every weight at zero, only what bypasses the weights is left: the shortcut."""
    _must_run(trial)
    for got, wanted in zip(_arrays(trial.mine["zero"]), _arrays(trial.theirs["zero"])):
        _must_equal(got, wanted, "with every weight at zero, only the shortcut is left, but ")


def result(trial: Trial) -> None:
    """The expression's value."""
    if "error" in trial.mine:
        raise Wrong(trial.mine["error"])
    difference = _value_difference(trial.mine["value"], trial.theirs["value"])
    if difference:
        raise Wrong(difference)


def unseen(trial: Trial) -> None:
    """All of the above that applies, on sizes that are not printed in the assignment."""
    for check in BY_PROBE[trial.case.probe]:
        check(trial)


CHECKS: dict[str, Callable[[Trial], None]] = {
    check.__name__: check
    for check in (shape, parameters, layers, values, gradients, modes, identity, result, unseen)
}
ALL_CASES = (
    "not done yet",
    "missing",
    "not allowed",
    "not readable",
    "syntax error",
)  # said without a case
BY_PROBE = {
    "evaluate": (result,),
    "count": (parameters, layers),
    "observe": (shape, parameters, layers, values),
}


def trials_of(check: str, trials: list[Trial], hidden: list[Trial]) -> list[Trial]:
    """The trials that `check` is about, of the exercise's visible and its hidden ones."""
    if check == "unseen":
        return hidden
    probes = {
        "result": ("evaluate",),
        "parameters": ("count", "observe"),
        "layers": ("count", "observe"),
    }
    return [t for t in trials if t.case.probe in probes.get(check, ("observe",))]


def verdict(check: str, trials: list[Trial]) -> str:
    """'' if the check passes on every trial, else what is wrong with the first that fails.

    What the worker sent may be anything, so any error on the way is the submission's.
    """
    for trial in trials:
        try:
            CHECKS[check](trial)
        except Wrong as wrong:
            text = str(wrong)
            return text if text.startswith(ALL_CASES) else f"{trial.case}: {text}"
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
            return f"{trial.case}: the answer makes no sense; does the submission change torch?"
    return ""


# ------------------------------------------------------------------------------------------ helpers


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
    return ", ".join(map(str, names[:4])) + (
        f" and {len(names) - 4} more" if len(names) > 4 else ""
    )


def _array(encoded: dict) -> np.ndarray:
    """The numbers of a tensor. A worker that plays by the rules sends two types only."""
    kind, _, data = encoded["$tensor"]
    if kind not in ("float64", "int64"):
        raise ValueError(kind)
    return np.frombuffer(base64.b64decode(data), dtype=kind)


def _arrays(encoded: list[dict]) -> list[tuple[list[int], np.ndarray]]:
    return [(item["$tensor"][1], _array(item)) for item in encoded]


def _must_equal(
    got: tuple[list[int], np.ndarray], wanted: tuple[list[int], np.ndarray], where: str
) -> None:
    (got_shape, a), (wanted_shape, b) = got, wanted
    if got_shape != wanted_shape or a.shape != b.shape:
        raise Wrong(f"{where}the shape is {tuple(got_shape)} and should be {tuple(wanted_shape)}")
    if not np.isfinite(a).all():
        raise Wrong(f"{where}the output has infinite or undefined numbers")
    largest, scale = np.abs(a - b).max(initial=0), max(1.0, np.abs(b).max(initial=0))
    if largest <= TOLERANCE * scale:
        return
    text = (
        f"{where}the output is off by up to {largest:.3g}, where values reach {np.abs(b).max():.3g}"
    )
    if np.ptp(a) == 0 < np.ptp(b):
        text += f"; every number is {a.flat[0]:.3g}: it does not depend on the input"
    elif np.allclose(np.maximum(a, 0), b, atol=TOLERANCE * scale):
        text += "; it would be right after a ReLU: the last one is missing"
    elif np.allclose(np.maximum(b, 0), a, atol=TOLERANCE * scale):
        text += "; there is a ReLU at the end that should not be"
    elif a.min() < 0 <= b.min():
        text += "; some numbers are negative, where a ReLU should be the last step"
    elif b.min() < 0 <= a.min():
        text += "; none is negative, where some should be: a ReLU at the wrong place"
    raise Wrong(text)


def _layer_difference(trial: Trial) -> str:
    """In words: what is different, missing or too many, by the student's names."""
    mine = [(str(name), str(text)) for name, text in trial.mine["layers"]]
    wanted = Counter(text for _, text in trial.theirs["layers"])
    extra = []
    for name, text in mine:
        if wanted[text] > 0:
            wanted[text] -= 1
        else:
            extra.append((name, text))
    missing = list(wanted.elements())
    lines = []
    for name, text in list(extra):
        close = difflib.get_close_matches(text, missing, n=1, cutoff=0.6)
        if close:
            missing.remove(close[0])
            extra.remove((name, text))
            lines.append(f"{name} is a {text}; expected {close[0]}")
    lines += [f"missing: {text}" for text in missing]
    lines += [f"too many: {name}, a {text}" for name, text in extra]
    more = f"; and {len(lines) - 3} more differences" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _value_difference(mine: Any, theirs: Any, where: str = "") -> str:
    """'' if two values of plain data agree (floats to 1e-6), else what was expected where."""
    if isinstance(theirs, dict) and "$tensor" in theirs:
        if not isinstance(mine, dict) or "$tensor" not in mine:
            return f"{where}expected {_short(theirs)}, got {_short(mine)}"
        try:
            _must_equal(*_arrays([mine]), *_arrays([theirs]), where)
        except Wrong as wrong:
            return str(wrong)
        return ""
    if isinstance(theirs, (dict, list)) and type(mine) is type(theirs) and len(mine) == len(theirs):
        keys = theirs if isinstance(theirs, dict) else range(len(theirs))
        for key in keys:
            if isinstance(theirs, dict) and key not in mine:
                return f"{where}{key} is missing from {_short(mine)}"
            difference = _value_difference(mine[key], theirs[key])
            if difference:
                return f"{where}expected {_short(theirs)}, got {_short(mine)}"
        return ""
    if isinstance(theirs, float) and isinstance(mine, (int, float)) and not isinstance(mine, bool):
        return (
            ""
            if np.isclose(mine, theirs, rtol=1e-6, atol=1e-9)
            else f"{where}expected {theirs:g}, got {mine:g}"
        )
    if isinstance(theirs, bool) == isinstance(mine, bool) and mine == theirs:
        return ""
    return f"{where}expected {_short(theirs)}, got {_short(mine)}"


def _short(value: Any) -> str:
    text = (
        f"a tensor of shape {tuple(value['$tensor'][1])}"
        if isinstance(value, dict) and "$tensor" in value
        else repr(value)
    )
    return text if len(text) <= 200 else text[:200] + "..."
