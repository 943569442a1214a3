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
import itertools
import json
import linecache
import re
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.grading import loading, mutants, weights
from common.grading.loading import Seal, Trouble
from common.grading.mutants import Noise
from common.grading.weights import NORMS

SAMPLE = 4096  # numbers of an output that are sent to the parent; of a larger one, every n-th
NAMING_SECONDS = 5.0  # of computing, for all known mistakes in one case
SKETCH = 256  # of these, what is enough to tell one variant from another


def answer_questions(connection: socket.socket) -> None:
    """One JSON line for each that comes, until the other end closes."""
    torch.set_num_threads(1)
    submission, dumps = Submission(), json.dumps
    names = ("load", "count", "observe", "arrange", "mistakes", "evaluate")
    probes = {name: getattr(submission, name) for name in names}
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
    sample, of which a sketch is a sample again.
    """
    if isinstance(value, Tensor):
        flat = value.detach().cpu().flatten()
        for limit in (SAMPLE, most):
            flat = flat[:: -(-len(flat) // limit) or 1]
        numbers = flat.to(torch.float64 if value.is_floating_point() else torch.int64).numpy()
        data = base64.b64encode(numbers.tobytes()).decode()
        return {"$tensor": [str(numbers.dtype), list(value.shape), data]}
    if isinstance(value, dict):
        return {str(k): plain(v, most) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        unordered = isinstance(value, (set, frozenset))
        return [plain(v, most) for v in (sorted(value, key=repr) if unordered else value)]
    if isinstance(value, np.generic):
        return value.item()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # a subclass may print as it likes
    return None if value is None else f"<{type(value).__name__}>"


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
            source: the file's bytes in base64.
            parts: what must be there.
            grafts: of the reference, never with the exercise's own parts: see `marking.grafts`.
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
        sys.argv = [filename]  # not the host's: the file may read its flags
        self.namespace = vars(module)
        self.namespace.update(loading.borrowed_imports(nodes, grafts["imports"]))
        loading.lock_doors(reference)
        # An optimizer would import it, and it puts its own in place of some of torch's functions.
        importlib.import_module("torch._dynamo")
        # Each worker computes on one thread, whatever the file says.
        torch.set_num_threads = torch.set_num_interop_threads = lambda number: None
        self.seal = Seal(loading, mutants, weights, sys.modules[__name__], Submission, Noise, types)
        loading.run_with_grafts(
            tree, filename, self.namespace, grafts["replace"], grafts["lacking"], exercise,
            grafts["others"],
        )  # fmt: skip
        exec(compile(setup, "<manifest>", "exec", dont_inherit=True), self.namespace)
        return {}

    def count(self, expression: str) -> dict:
        """Build the module of `expression` on the meta device, where it costs nothing, and list it.

        No forward pass: the first tensor computed on meta makes torch import its compiler, 160 MB
        and two seconds.
        """
        with torch.device("meta"):
            module = self._module(expression)
        layers = [[name, what(layer)] for layer, name in weights.layers_of(module).items()]
        return {"parameters": sum(p.numel() for p in module.parameters()), "layers": layers}

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
        """Build the module of `expression` and watch it work on random inputs of these shapes.

        Args:
            careful: look also whether these numbers use every activation on both of its sides.
            slots: of the reference, with `arrangement`, the number of one of its assignments: fill
                the module by that one and not by the rule.
        """
        module, forward = self._build(expression, inputs, as_list, seed)
        initial = [_initial(layer) for layer in weights.layers_of(module)]
        units, error = weights.units_of(module, forward)
        seen: dict[str, Any] = {
            "parameters": sum(p.numel() for p in module.parameters()),
            "layers": [[unit.name, what(unit.layer)] for unit in units],
            "initial": initial,
            "slots": [unit.slot() for unit in units],
        }
        if error is not None:
            return {**seen, "forward_error": self.describe(error)}
        sources = weights.by_rule(units)
        if slots is not None:
            chosen = itertools.islice(weights.arrangements(units, slots), arrangement, None)
            if (sources := next(chosen, None)) is None:
                raise Trouble("the submission's layers change from one look to the next")
        filler = partial(weights.fill, sources, seed)
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
        for sources in itertools.islice(weights.arrangements(units, slots), weights.MOST):
            weights.fill(sources, seed)
            tried.append(plain(forward(), SKETCH))
        return {"tried": tried}

    def mistakes(self, expression: str, inputs: list[list[int]], as_list: bool, seed: int) -> dict:
        """What comes out of this module, the reference, with one mistake or the other in it."""
        module, forward = self._build(expression, inputs, as_list, seed)
        units, _ = weights.units_of(module, forward)
        module.eval()
        weights.fill(weights.by_rule(units), seed)
        with mutants.Watch() as watch:
            right = forward()
        state = {k: v.clone() for k, v in module.state_dict().items()}
        ends = mutants.at_the_end(right, self.last_inputs)
        found = [[text, plain(ys, SKETCH), None] for text, ys in ends]
        started = time.process_time()
        # The commonest first: on a large net there isn't the time for all.
        likely = ("missing", "left out", "every")
        candidates = sorted(
            mutants.mistakes(watch.calls), key=lambda m: not any(word in m[0] for word in likely)
        )
        for text, changes in candidates:
            if time.process_time() - started > NAMING_SECONDS:
                break
            evaluated = right if "dropout" in text else mutants.run(forward, changes)
            if evaluated is not None:
                module.train()
                with Noise(seed):
                    trained = mutants.run(forward, changes)
                module.load_state_dict(state)
                module.eval()
                found.append([text, plain(evaluated, SKETCH), plain(trained, SKETCH)])
        return {"mistakes": found}

    def _build(
        self, expression: str, inputs: list[list[int]], as_list: bool, seed: int
    ) -> tuple[nn.Module, Callable[..., list[Tensor]]]:
        _start_anew(seed)
        module = self._module(expression)
        generator = torch.Generator().manual_seed(seed)
        # Images a little larger than they come, so that what ends at 6 is told from what does not.
        tensors = [
            (2.5 if len(shape) == 4 else 1.0) * torch.randn(shape, generator=generator)
            for shape in inputs
        ]

        def forward(grad: bool = False) -> list[Tensor]:
            # A block that works in place must not spoil the next pass; and it gets no leaves, which
            # torch would not let it change, but what another layer could have made.
            self.last_inputs = [t.clone().requires_grad_(grad) for t in tensors]
            with torch.set_grad_enabled(grad):
                x = [leaf.clone() for leaf in self.last_inputs]
                return outputs(module(x) if as_list else module(*x))

        if any(map(nn.parameter.is_lazy, module.parameters())):
            with contextlib.suppress(Exception):  # it is tried again
                forward()  # the sizes of lazy layers follow from their first input
        return module, forward

    def _module(self, expression: str) -> nn.Module:
        module = eval(expression, self.namespace)
        if not isinstance(module, nn.Module):
            raise Trouble(f"gives {_a(module)}, where an nn.Module is expected")
        return module

    def _watch(self, module: nn.Module, filler: Callable, forward: Callable, seed: int) -> dict:
        seen: dict[str, Any] = {}
        filler()
        module.eval()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        with Noise(seed) as noise:
            in_eval = forward()
        seen["eval"] = plain(in_eval)
        seen["eval_repeats"] = not noise.drawn and _equal(in_eval, forward())
        state = module.state_dict()
        seen["eval_changes"] = [k for k, v in state.items() if not torch.equal(v, before[k])]

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
        module.load_state_dict(before)
        with Noise(seed) as noise:
            in_train = forward()
        seen["train"] = plain(in_train)
        state = module.state_dict()
        seen["train_changes"] = sum(not torch.equal(v, before[k]) for k, v in state.items())
        seen["train_is_eval"] = _equal(in_train, in_eval)
        seen["train_repeats"] = not noise.drawn and _equal(in_train, forward())
        if noise.drawn:
            module.load_state_dict(before)
            with Noise(seed, flip=True):
                seen["train_flipped"] = plain(forward())

        module.eval()
        filler(zero=True)
        seen["zero"] = plain(forward())
        return seen

    def evaluate(self, expression: str, seed: int) -> dict:
        """The value of an expression."""
        _start_anew(seed)
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
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == self.filename][-1:]
        where = "".join(f" (line {x.lineno}: {(x.line or '').strip()[:120]})" for x in own)
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


def _start_anew(seed: int) -> None:
    """As torch is at first: the file may have switched gradients off, or over to float64."""
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.manual_seed(seed)


def outputs(result: object) -> list[Tensor]:
    """All tensors of what `forward` returned: one, or those of a tuple, list or dict."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    parts = result if isinstance(result, (list, tuple)) else ()
    if parts and all(part is None or isinstance(part, Tensor) for part in parts):
        return [part for part in parts if part is not None]
    raise Trouble(f"forward gives {_a(result)}, where a tensor is expected")


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _initial(layer: nn.Module) -> list[Any]:
    """A layer in words, its size, and of weight and bias: how many numbers, mean, spread."""
    roles = (layer._parameters.get(role) for role in ("weight", "bias"))
    held = [p.detach().double() for p in roles if p is not None]
    sizes = " ".join(f"{len(p)}x{p.numel() // max(1, len(p))}" for p in held)
    numbers = [[p.numel(), float(p.mean()), float(p.std(correction=0))] for p in held]
    return [what(layer), sizes, numbers]


def what(layer: nn.Module) -> str:
    """A layer in words; a 1x1 convolution has those of the linear layer that does the same."""
    bias = ", no bias" if getattr(layer, "bias", None) is None else ", bias"
    if isinstance(layer, nn.Linear):
        return f"1x1 convolution or linear {layer.in_features} -> {layer.out_features}{bias}"
    if isinstance(layer, nn.Conv2d):
        (height, width), padding = layer.kernel_size, _padding(layer)
        channels = f"{layer.in_channels} -> {layer.out_channels}"
        if (height, width, layer.stride, layer.groups, padding) == (1, 1, (1, 1), 1, 0):
            return f"1x1 convolution or linear {channels}{bias}"
        details = _unusual(
            ("stride", layer.stride, (1, 1)),
            ("padding", padding, 0),
            ("padding mode", layer.padding_mode if padding else "zeros", "zeros"),
            ("dilation", layer.dilation, (1, 1)),
            ("groups", layer.groups, 1),
        )
        text = f"{height}x{width} convolution {channels}{details}{bias}"
        return re.sub(r"\((\d+), \1\)", r"\1", text)
    if isinstance(layer, NORMS):
        size = getattr(layer, "num_features", None) or getattr(layer, "normalized_shape", "")
        affine = "" if layer._parameters.get("weight") is not None else ", no weight and bias"
        details = _unusual(
            ("eps", f"{layer.eps:g}", "1e-05"),
            ("momentum", getattr(layer, "momentum", 0.1), 0.1),
            ("running statistics", getattr(layer, "track_running_stats", True), True),
        )
        return f"{type(layer).__name__} {size}{affine}{details}"
    shapes = [tuple(p.shape) for p in layer._parameters.values() if p is not None]
    return f"{type(layer).__name__} with {shapes}"


def _unusual(*rows: tuple[str, object, object]) -> str:
    """What is not as usual, of rows of word, value and usual value."""
    return "".join(f", {word} {value}" for word, value, usual in rows if value != usual)


def _padding(layer: nn.Conv2d) -> tuple[int, ...] | int:
    padding = layer.padding
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size))
    return 0 if padding in ("valid", (0, 0)) else padding
