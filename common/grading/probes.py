"""What runs inside a worker: put the submission together, try it out, say what was seen.

There are no verdicts here. The parent compares these observations with those of the reference,
made by the same code. Weights are not copied from one to the other, because a student may name and
register layers in any order: both sides fill theirs by rule (`weights`).
"""

from __future__ import annotations

import ast
import base64
import contextlib
import importlib
import json
import linecache
import re
import sys
import time
import traceback
import types
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from common.grading import loading, mutants, weights
from common.grading.loading import Seal, Trouble
from common.grading.mutants import Noise
from common.grading.weights import NORMS, Arrangement, Unit

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

SAMPLE = 4096  # numbers of an output that are sent to the parent; of a larger one, every n-th
NAMING_SECONDS = 5.0  # of computing, for all known mistakes in one case
SKETCH = 256  # of these, what is enough to tell one variant from another


# --------------------------------------------------------------------------- questions and answers


def answer_questions(connection: socket.socket) -> None:
    """One JSON line for each that comes, until the other end closes."""
    torch.set_num_threads(1)
    submission = Submission()
    probes: dict[str, Callable[..., dict]] = {
        "load": submission.load,
        "count": submission.count,
        "observe": submission.observe,
        "arrange": submission.arrange,
        "mistakes": submission.mistakes,
        "evaluate": submission.evaluate,
    }
    dumps = json.dumps
    for line in connection.makefile("r", encoding="utf-8"):
        question = json.loads(line)
        number, probe = question.pop("number"), probes[question.pop("probe")]
        try:
            answer = probe(**question)
            if submission.seal is not None:
                submission.seal.check()
        except BaseException as error:  # SystemExit and KeyboardInterrupt of the submission too
            answer = {"error": submission.describe(error)}
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the submission may have closed or replaced it
                stream.flush()
        connection.sendall(dumps({**answer, "number": number}).encode() + b"\n")


def plain(value: object, most: int = SAMPLE) -> Any:
    """`value` as JSON data. A tensor becomes its type, shape and bytes; of a large one a regular
    sample.
    """
    if isinstance(value, Tensor):
        shape, flat = list(value.shape), value.detach().cpu().flatten()
        flat = _thin(flat, SAMPLE).to(torch.float64 if value.is_floating_point() else torch.int64)
        flat = _thin(flat, most)
        data = base64.b64encode(flat.numpy().tobytes()).decode()
        return {"$tensor": [str(flat.numpy().dtype), shape, data]}
    if isinstance(value, dict):
        return {str(k): plain(v, most) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        unordered = isinstance(value, (set, frozenset))
        return [plain(v, most) for v in (sorted(value, key=repr) if unordered else value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (bool, int, float, str)):  # a subclass may print as it likes
        return next(kind for kind in (bool, int, float, str) if isinstance(value, kind))(value)
    return f"<{type(value).__name__}>"


def _thin(flat: Tensor, most: int) -> Tensor:
    return flat[:: -(-flat.numel() // most) or 1]


class Submission:
    """A file as a module, with the parts of all other exercises replaced by the reference's."""

    def __init__(self) -> None:
        self.filename = "<submission>"
        self.namespace: dict[str, Any] = {}
        self.seal: Seal | None = None

    def load(
        self,
        filename: str,
        source: str,
        parts: list[str],
        grafts: dict[str, Any],
        setup: str,
        reference: str,
        exercise: str,
    ) -> dict:
        """Run the file, with everything that is not this exercise's replaced by the reference's.

        Args:
            filename: what to call the file in messages.
            source: its bytes in base64.
            parts: the exercise's classes, functions and `Class.method`s; they must be there.
            grafts: of the reference, never with the exercise's own parts: "imports", "replace" and
                "lacking", the latter two name -> compiled code.
            setup: helpers of the manifest's cases.
            reference: the module that the exercise is taken from, and the submission may not.
            exercise: its number.
        """
        self.filename = filename
        text = loading.decode(base64.b64decode(source))
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        tree = ast.parse(text, filename)
        imported = ast.parse(grafts["imports"]).body
        allowed = {name for node in imported for name in loading.names_taken(node)}
        nodes = list(ast.walk(tree))
        loading.refuse_imports(nodes, {**loading.FORBIDDEN, reference: "the solution"}, allowed)
        loading.require_parts(tree, parts, filename)

        module = types.ModuleType("submission")
        module.__file__ = filename
        sys.modules["submission"] = module  # dataclasses look their module up
        self.namespace = vars(module)
        self.namespace.update(loading.borrowed_imports(nodes, grafts["imports"]))
        loading.lock_doors(reference)
        # An optimizer would import it, and it puts its own in place of some of torch's functions.
        importlib.import_module("torch._dynamo")
        # Each worker computes on one thread, whatever the file says.
        torch.set_num_threads = torch.set_num_interop_threads = lambda number: None
        self.seal = Seal(loading, mutants, weights, sys.modules[__name__], Submission, Noise, types)
        loading.run_with_grafts(
            tree, filename, self.namespace, grafts["replace"], grafts["lacking"], exercise
        )
        exec(compile(setup, "<manifest>", "exec", dont_inherit=True), self.namespace)
        return {}

    def count(self, expression: str) -> dict:
        """Build the module that `expression` gives on the meta device, where weights cost nothing,
        and list it.

        No forward pass: the first tensor computed on meta makes torch import its compiler, 160 MB
        and two seconds.
        """
        with torch.device("meta"):
            module = self._module(expression)
        layers = [[name, what(layer)] for layer, name in weights.layers_of(module).items()]
        return {"parameters": _count(module), "layers": layers}

    def observe(
        self,
        expression: str,
        inputs: list[list[int]],
        as_list: bool,
        seed: int,
        slots: list | None = None,
        arrangement: int = 0,
        careful: bool = False,
    ) -> dict:
        """Build the module that `expression` gives and watch it work on random inputs of the given
        shapes.

        Args:
            careful: look also whether these numbers use every activation on both of its sides.
            slots: of the reference, with `arrangement`, the number of one of its assignments: fill
                the module by that one and not by the rule.
        """
        module, forward = self._build(expression, inputs, as_list, seed)
        initial = [_initial(layer) for layer in weights.layers_of(module)]
        units, error = weights.units_of(module, forward)
        seen: dict[str, Any] = {
            "parameters": _count(module),
            "layers": [[unit.name, what(unit.layer)] for unit in units],
            "initial": initial,
            "slots": [unit.slot() for unit in units],
        }
        if error is not None:
            return {**seen, "forward_error": self.describe(error)}
        filler = partial(weights.fill, units, seed)
        if slots is not None:
            filler = partial(self._arrangement(units, slots, arrangement).fill, seed)
        try:
            seen["shapes"] = [list(y.shape) for y in forward()]
            seen.update(self._watch(module, filler, forward, seed))
            if careful:
                filler()
                seen["silent"] = mutants.silent_activations(forward)
        except Exception as failure:
            seen["forward_error"] = self.describe(failure)
        return seen

    def arrange(
        self, expression: str, inputs: list[list[int]], as_list: bool, seed: int, slots: list
    ) -> dict:
        """The outputs in eval mode under each assignment of the reference's numbers to this
        module's tensors that the shapes allow.
        """
        module, forward = self._build(expression, inputs, as_list, seed)
        units, error = weights.units_of(module, forward)
        if error is not None:
            return {"tried": []}
        module.eval()
        tried = []
        for one in weights.arrangements(units, slots):
            one.fill(seed)
            tried.append(plain(forward(), SKETCH))
        return {"tried": tried}

    def _arrangement(self, units: list[Unit], slots: list, number: int) -> Arrangement:
        for i, one in enumerate(weights.arrangements(units, slots)):
            if i == number:
                return one
        raise Trouble("the submission's layers change from one look to the next")

    def mistakes(self, expression: str, inputs: list[list[int]], as_list: bool, seed: int) -> dict:
        """What comes out of this module, the reference, with one mistake or the other in it."""
        module, forward = self._build(expression, inputs, as_list, seed)
        units, _ = weights.units_of(module, forward)
        module.eval()
        weights.fill(units, seed)
        calls, right = mutants.record(forward)
        state = {k: v.clone() for k, v in module.state_dict().items()}

        def in_train(changes: dict) -> list[Tensor] | None:
            module.train()
            with Noise(seed):
                result = mutants.run(forward, changes)
            module.load_state_dict(state)
            module.eval()
            return result

        found = [
            [text, plain(ys, SKETCH), None]
            for text, ys in mutants.at_the_end(right, self.last_inputs)
        ]
        started = time.process_time()
        # The commonest first: on a large net there isn't the time for all.
        likely = ("missing", "left out", "in place of every", "every")
        candidates = sorted(
            mutants.mistakes(calls), key=lambda m: not any(word in m[0] for word in likely)
        )
        for text, changes in candidates:
            if time.process_time() - started > NAMING_SECONDS:
                break
            evaluated = right if "dropout" in text else mutants.run(forward, changes)
            if evaluated is not None:
                trained = in_train(changes)
                found.append([text, plain(evaluated, SKETCH), plain(trained, SKETCH)])
        return {"mistakes": found}

    def _build(
        self, expression: str, inputs: list[list[int]], as_list: bool, seed: int
    ) -> tuple[nn.Module, Callable[..., list[Tensor]]]:
        torch.manual_seed(seed)
        torch.set_grad_enabled(True)  # the file may have switched it off
        module = self._module(expression)
        generator = torch.Generator().manual_seed(seed)
        # Images a little larger than they come, so that what ends at 6 is told from what does not.
        tensors = [
            (2.5 if len(shape) == 4 else 1.0) * torch.randn(shape, generator=generator)
            for shape in inputs
        ]

        def forward(grad: bool = False) -> list[Tensor]:
            # A block that works in place must not spoil the next pass.
            x = [t.clone().requires_grad_(grad) for t in tensors]
            self.last_inputs = x
            with torch.set_grad_enabled(grad):
                return outputs(module(x) if as_list else module(*x))

        return module, forward

    def _module(self, expression: str) -> nn.Module:
        module = eval(expression, self.namespace)
        if not isinstance(module, nn.Module):
            raise Trouble(f"gives {_a(module)}, where an nn.Module is expected")
        return module

    def _watch(
        self,
        module: nn.Module,
        filler: Callable[..., None],
        forward: Callable[..., list[Tensor]],
        seed: int,
    ) -> dict:
        seen: dict[str, Any] = {}
        filler()
        module.eval()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        with Noise(seed) as noise:
            in_eval = forward()
        seen["eval"] = plain(in_eval)
        seen["eval_repeats"] = not noise.drawn and _equal(in_eval, forward())
        seen["eval_changes"] = [
            k for k, v in module.state_dict().items() if not torch.equal(v, before[k])
        ]

        ys = forward(grad=True)
        generator = torch.Generator().manual_seed(seed + 1)
        total = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in ys)
        if total.requires_grad:
            total.backward()
        seen["no_gradient"] = [
            name
            for name, p in module.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
        ]
        seen["input_gradient"] = plain([t.grad for t in self.last_inputs])

        module.train()
        for name, flip in (("train", False), ("train_flipped", True)):
            module.load_state_dict(before)
            with Noise(seed, flip) as noise:
                result = forward()
            seen[name] = plain(result)
            if not flip:
                in_train, drawn = result, bool(noise.drawn)
                state = module.state_dict()
                seen["train_changes"] = sum(not torch.equal(v, before[k]) for k, v in state.items())
                if not drawn:
                    break
        seen["train_is_eval"] = _equal(in_train, in_eval)
        seen["train_repeats"] = not drawn and _equal(in_train, forward())

        module.eval()
        filler(zero=True)
        seen["zero"] = plain(forward())
        return seen

    def evaluate(self, expression: str, seed: int) -> dict:
        """The value of an expression."""
        torch.manual_seed(seed)
        value = eval(expression, self.namespace)
        if value is NotImplemented:
            raise Trouble("gives NotImplemented")
        return {"value": plain(value)}

    def describe(self, error: BaseException) -> str:
        """An error in one line, with the last line of the submission that led to it."""
        if isinstance(error, Trouble):
            return str(error)
        if isinstance(error, SyntaxError) and error.filename == self.filename:
            text = (error.text or "").strip()[:120]
            return f"syntax error in line {error.lineno}: {error.msg}: {text}"
        where = ""
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == self.filename:
                where = f" (line {frame.lineno}: {(frame.line or '').strip()[:120]})"
        try:
            text = " ".join(str(error).split())[:300]
        except Exception:  # an exception whose own __str__ fails
            text = ""
        if isinstance(error, SystemExit):
            return f"it calls sys.exit(){where}"
        if isinstance(error, NotImplementedError):
            return f"not done yet: {text}"
        if isinstance(error, MemoryError) or "can't allocate memory" in text:
            return f"out of memory{where}: {text}"
        return f"{type(error).__name__}: {text}{where}"


# ----------------------------------------------------------------------------------------- watching


def outputs(result: object) -> list[Tensor]:
    """All tensors of what `forward` returned: one, or those of a tuple, list or dict."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    if (
        isinstance(result, (list, tuple))
        and result
        and all(r is None or isinstance(r, Tensor) for r in result)
    ):
        return [r for r in result if r is not None]
    raise Trouble(f"forward gives {_a(result)}, where a tensor is expected")


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _initial(layer: nn.Module) -> list[Any]:
    """A layer in words, its size, and of weight and bias: how many numbers, mean, spread."""
    numbers, sizes = [], []
    for role in ("weight", "bias"):
        p = layer._parameters.get(role)
        if p is not None:
            p = p.detach().double()
            sizes.append(f"{len(p)}x{p.numel() // max(1, len(p))}")
            numbers.append([p.numel(), float(p.mean()), float(p.std(correction=0))])
    return [what(layer), " ".join(sizes), numbers]


def what(layer: nn.Module) -> str:
    """A layer in words, the same words for a 1x1 convolution and the linear layer that computes the
    same.
    """
    bias = "" if getattr(layer, "bias", None) is None else ", bias"
    if isinstance(layer, nn.Linear):
        channels = f"{layer.in_features} -> {layer.out_features}"
        return f"1x1 convolution or linear {channels}{bias or ', no bias'}"
    if isinstance(layer, nn.Conv2d):
        kernel, channels = layer.kernel_size, f"{layer.in_channels} -> {layer.out_channels}"
        if (
            kernel == (1, 1)
            and layer.stride == (1, 1)
            and layer.groups == 1
            and not _padding(layer)
        ):
            return f"1x1 convolution or linear {channels}{bias or ', no bias'}"
        details = [
            f", {word} {value}"
            for word, value, usual in (
                ("stride", layer.stride, (1, 1)),
                ("padding", _padding(layer), 0),
                ("padding mode", layer.padding_mode, "zeros"),
                ("dilation", layer.dilation, (1, 1)),
                ("groups", layer.groups, 1),
            )
            if value != usual and not (word == "padding mode" and not _padding(layer))
        ]
        text = (
            f"{kernel[0]}x{kernel[1]} convolution {channels}{''.join(details)}{bias or ', no bias'}"
        )
        return re.sub(r"\((\d+), \1\)", r"\1", text)
    if isinstance(layer, NORMS):
        size = getattr(layer, "num_features", None) or getattr(layer, "normalized_shape", "")
        details = [
            f", {word} {value}"
            for word, value, usual in (
                ("eps", f"{layer.eps:g}", "1e-05"),
                ("momentum", getattr(layer, "momentum", 0.1), 0.1),
                ("running statistics", getattr(layer, "track_running_stats", True), True),
            )
            if value != usual
        ]
        affine = "" if layer._parameters.get("weight") is not None else ", no weight and bias"
        return f"{type(layer).__name__} {size}{affine}{''.join(details)}"
    shapes = [tuple(p.shape) for p in layer._parameters.values() if p is not None]
    return f"{type(layer).__name__} with {shapes}"


def _padding(layer: nn.Conv2d) -> tuple[int, ...] | int:
    padding = layer.padding
    if padding == "valid":
        padding = (0, 0)
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size))
    return 0 if padding == (0, 0) else padding
