"""What runs inside a worker: put the submission together, try it out, say what was seen.

There are no verdicts here. The parent compares these observations with those of the reference,
made by the same code. Weights are not copied from one to the other, because a student may name and
register layers in any order. Both sides fill theirs by rule instead: a layer's numbers follow from
the seed, its kind and shape, and how many of its like ran before.
"""

from __future__ import annotations
import __future__

import ast
import base64
import builtins
import contextlib
import difflib
import hashlib
import io
import json
import linecache
import os
import re
import sys
import tokenize
import traceback
import types
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)
SAMPLE = 4096  # numbers of an output that are sent to the parent; of a larger one, every n-th

# What a submission may not take its models from.
FORBIDDEN = {
    "torchvision.models": "torchvision's models",
    "torch.hub": "models from the network",
    "timm": "timm",
    "common.lessons": "the course's own lessons",
    "common.grading.exercises": "the grader",
    "common.grading.sandbox": "the grader",
    "common.grade": "the grader",
}
LESSON_NAME = re.compile(r"\d\d_\w+")
LESSON_FILE = re.compile(r"\d\d_\w+\.(py|[\w.-]+\.pyc)")


class Trouble(Exception):
    """Something to tell the student, in one line."""


# --------------------------------------------------------------------------- questions and answers


def answer_questions(connection: socket.socket) -> None:
    """One JSON line for each that comes, until the other end closes."""
    torch.set_num_threads(1)
    submission = Submission()
    probes: dict[str, Callable[..., dict]] = {
        "load": submission.load,
        "count": submission.count,
        "observe": submission.observe,
        "evaluate": submission.evaluate,
    }
    for line in connection.makefile("r", encoding="utf-8"):
        question = json.loads(line)
        number, probe = question.pop("number"), probes[question.pop("probe")]
        try:
            answer = probe(**question)
        except BaseException as error:  # SystemExit and KeyboardInterrupt of the submission too
            answer = {"error": submission.describe(error)}
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the submission may have closed or replaced it
                stream.flush()
        connection.sendall(json.dumps({**answer, "number": number}).encode() + b"\n")


def plain(value: object) -> Any:
    """`value` as JSON data. A tensor becomes its type, shape and bytes; of a large one a regular
    sample.
    """
    if isinstance(value, Tensor):
        shape, flat = list(value.shape), value.detach().cpu().flatten()
        flat = flat[:: -(-flat.numel() // SAMPLE) or 1].to(
            torch.float64 if value.is_floating_point() else torch.int64
        )
        return {
            "$tensor": [
                str(flat.numpy().dtype),
                shape,
                base64.b64encode(flat.numpy().tobytes()).decode(),
            ]
        }
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [
            plain(v)
            for v in (sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value)
        ]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return f"<{type(value).__name__}>"


class Submission:
    """A file as a module, with the parts of all other exercises replaced by the reference's."""

    def __init__(self) -> None:
        self.filename = "<submission>"
        self.namespace: dict[str, Any] = {}

    def load(
        self,
        filename: str,
        source: str,
        parts: list[str],
        grafts: dict[str, Any],
        setup: str,
        reference: str,
    ) -> dict:
        """Run the file, with everything that is not this exercise's replaced by the reference's.

        Args:
            filename: what to call the file in messages.
            source: its bytes in base64.
            parts: the exercise's classes, functions and `Class.method`s; they must be there.
            grafts: of the reference, never with the exercise's own parts: "imports", "replace" and
                "lacking", the latter two name -> source text.
            setup: helpers of the manifest's cases.
            reference: the module that the exercise is taken from, and the submission may not.
        """
        self.filename = filename
        text = decode(base64.b64decode(source))
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        tree = ast.parse(text, filename)
        allowed = {name for node in ast.parse(grafts["imports"]).body for name in names_taken(node)}
        nodes = list(ast.walk(tree))
        refuse_imports(nodes, {**FORBIDDEN, reference: "the solution"}, allowed)
        require_parts(tree, parts, filename)
        lock_doors()

        module = types.ModuleType("submission")
        module.__file__ = filename
        sys.modules["submission"] = module  # dataclasses look their module up
        self.namespace = vars(module)
        self.namespace.update(borrowed_imports(nodes, grafts["imports"]))
        later = []
        for code, own in graft(tree, filename, grafts["replace"], grafts["lacking"]):
            try:
                exec(code, self.namespace)
            except NameError:
                if own:
                    raise
                later.append(code)  # what the submission lacks may need what comes further down
        for code in later:
            with contextlib.suppress(Exception):
                exec(code, self.namespace)
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
        return _listing(module, layers_of(module))

    def observe(self, expression: str, inputs: list[list[int]], as_list: bool, seed: int) -> dict:
        """Build the module that `expression` gives and watch it work on random inputs of the given
        shapes.
        """
        torch.manual_seed(seed)
        module = self._module(expression)
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(shape, generator=generator) for shape in inputs]

        def forward(grad: bool = False) -> list[Tensor]:
            x = [
                t.clone() for t in tensors
            ]  # a block that works in place must not spoil the next pass
            for t in x:
                t.requires_grad_(grad)
            self.last_inputs = x
            with torch.set_grad_enabled(grad):
                return outputs(module(x) if as_list else module(*x))

        layers, error = in_order_of_use(module, forward)
        seen = _listing(module, layers)
        if error is not None:
            return {**seen, "forward_error": self.describe(error)}
        try:
            seen["shapes"] = [list(y.shape) for y in forward()]
            seen.update(self._watch(module, list(layers), forward, seed))
        except Exception as failure:
            seen["forward_error"] = self.describe(failure)
        return seen

    def _module(self, expression: str) -> nn.Module:
        module = eval(expression, self.namespace)
        if not isinstance(module, nn.Module):
            raise Trouble(f"gives {_a(module)}, where an nn.Module is expected")
        return module

    def _watch(
        self,
        module: nn.Module,
        layers: list[nn.Module],
        forward: Callable[..., list[Tensor]],
        seed: int,
    ) -> dict:
        seen: dict[str, Any] = {}
        fill(module, layers, seed)
        module.eval()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        in_eval = forward()
        seen["eval"] = plain(in_eval)
        seen["eval_repeats"] = _equal(in_eval, forward())
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
        torch.manual_seed(seed)
        generator_before = torch.get_rng_state()
        in_train = forward()
        seen["train"] = plain(in_train)
        seen["train_is_eval"] = _equal(in_train, in_eval)
        # One coin for a whole batch often falls the same way twice, so who throws coins is asked
        # more often.
        throws = not torch.equal(torch.get_rng_state(), generator_before)
        seen["train_repeats"] = all(_equal(in_train, forward()) for _ in range(30 if throws else 1))
        state = module.state_dict()
        seen["train_changes"] = sum(not torch.equal(v, before[k]) for k, v in state.items())

        module.eval()
        fill(module, layers, seed, zero=True)
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


# -------------------------------------------------------------------------- putting it together


def decode(data: bytes) -> str:
    """Source text by Python's own rule: UTF-8, or what one of the first two lines declares."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        bad = next((i for i, line in enumerate(data.split(b"\n"), 1) if not _is_utf8(line)), 1)
        raise Trouble(
            f"not readable as text: line {bad} is not UTF-8 and the file declares no other "
            "encoding; save it as UTF-8"
        ) from None
    if "\0" in text:
        raise Trouble("not readable as text: the file holds zero bytes; save it as UTF-8")
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def refuse_imports(nodes: list[ast.AST], forbidden: dict[str, str], allowed: set[str]) -> None:
    """Raises: Trouble, at the first place where a finished model is taken from elsewhere.

    What the reference imports itself is allowed.
    """
    for node in nodes:
        for name in names_taken(node):
            source = next(
                (what for k, what in forbidden.items() if f"{name}.".startswith(f"{k}.")), None
            )
            if LESSON_NAME.match(name):
                source = "a lesson of the course"
            if source and name not in allowed:
                raise Trouble(
                    f"not allowed: line {node.lineno} takes from {source} ({name}); "
                    "build the model yourself"
                )


def names_taken(node: ast.AST) -> list[str]:
    """The dotted names of what a node imports or reaches for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Attribute):
        return [_dotted(node)]
    if isinstance(node, ast.Call) and _dotted(node.func).endswith(("import_module", "__import__")):
        return [
            a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
        ]
    return []


def _dotted(node: ast.expr) -> str:
    """'torch.hub.load' for such a node, '' for anything that isn't names joined by dots."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def lock_doors() -> None:
    """The same rule for what the source does not show. It stops the idle, not the determined: see
    the docs.
    """

    def guard(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            name = os.path.basename(os.fsdecode(args[0]))
            if LESSON_FILE.fullmatch(name):
                raise PermissionError(f"not allowed: a submission may not read {name}")
        elif event in ("os.kill", "os.killpg") and args[0] != os.getpid():
            raise PermissionError(
                "not allowed: a submission may not send signals to other processes"
            )

    sys.addaudithook(guard)
    locked = sys.modules["torchvision.models"] = _Locked("torchvision.models")
    if "torchvision" in sys.modules:
        sys.modules["torchvision"].models = locked
    sys.modules["timm"] = None  # type: ignore[assignment]  # importing it raises ImportError


class _Locked(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("not allowed: a submission may not use torchvision's models")


def definitions(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Name -> statement, for what the body of a module or class defines or assigns."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update({t.id: node for t in targets if isinstance(t, ast.Name)})
    return found


def require_parts(tree: ast.Module, parts: list[str], filename: str) -> None:
    """Raises: Trouble, naming the part that is missing, and what looks like it."""
    top = definitions(tree.body)
    for part in parts:
        owner, _, name = part.rpartition(".")
        names = top
        if owner and isinstance(top.get(owner), ast.ClassDef):
            names = definitions(top[owner].body)
        elif owner:
            name = owner
        if name not in names:
            same = [other for other in names if other.lower() == name.lower()]
            close = same or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            guess = f"; did you mean {close[0]}?" if close else ""
            raise Trouble(f"missing: {name} is not defined in {filename}{guess}")


def borrowed_imports(nodes: list[ast.AST], imports: str) -> dict[str, Any]:
    """The reference's imports, for the grafted definitions, less the names that the submission
    itself forgot.

    Otherwise a submission without `import torch.nn.functional as F` would work here and nowhere
    else.
    """
    used, bound = set(), set(dir(builtins))
    for node in nodes:
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    borrowed: dict[str, Any] = {}
    exec(compile(imports, "<reference>", "exec", dont_inherit=True), borrowed)
    return {k: v for k, v in borrowed.items() if k not in used - bound and k != "__builtins__"}


def graft(
    tree: ast.Module, filename: str, replace: dict[str, str], lacking: dict[str, str]
) -> Iterator[tuple[types.CodeType, bool]]:
    """The submission statement by statement, with the reference's in place of those to be replaced.

    Statement by statement, because each code object carries one file name: no message shall quote
    grafted text as the student's. With each comes whether it belongs to the submission, or stands
    in for what it lacks.
    """
    own = definitions(tree.body)
    for name, text in replace.items():
        owner, _, method = name.rpartition(".")
        if owner and isinstance(own.get(owner), ast.ClassDef):
            # A method: goes into the student's class, which this exercise is about.
            body = [n for n in own[owner].body if getattr(n, "name", None) != method]
            own[owner].body = [*body, *ast.parse(text).body]

    future = __future__.annotations.compiler_flag
    declared = any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)

    def code(node: ast.stmt, name: str, flags: int) -> types.CodeType:
        return compile(ast.Module([node], []), name, "exec", flags=flags, dont_inherit=True)

    def reference(text: str) -> Iterator[types.CodeType]:
        return (code(node, "<reference>", future) for node in ast.parse(text).body)

    imports = 0
    while imports < len(tree.body) and isinstance(
        tree.body[imports], (ast.Expr, ast.Import, ast.ImportFrom)
    ):
        imports += 1
    for node in tree.body[:imports]:
        yield code(node, filename, future * declared), True
    for name, text in lacking.items():
        if name not in own:
            yield from ((part, False) for part in reference(text))
    for node in tree.body[imports:]:
        name = getattr(node, "name", None)
        if name in replace:
            yield from ((part, True) for part in reference(replace[name]))
        else:
            yield code(node, filename, future * declared), True


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


def layers_of(module: nn.Module) -> dict[nn.Module, str]:
    """Layer -> its name, for the layers that hold parameters, as they were registered."""
    return {
        layer: name or "(the module itself)"
        for name, layer in module.named_modules()
        if layer._parameters or isinstance(layer, NORMS)
    }


def in_order_of_use(
    module: nn.Module, forward: Callable[[], list[Tensor]]
) -> tuple[dict[nn.Module, str], Exception | None]:
    """The same as a forward pass meets them, and behind them those that it doesn't; and its error,
    if it fails.
    """
    layers = layers_of(module)
    met: dict[nn.Module, None] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, _: met.setdefault(layer)) for layer in layers
    ]
    module.eval()
    error = None
    try:
        forward()
    except Exception as failure:
        error = failure
    for hook in hooks:
        hook.remove()
    return {layer: layers[layer] for layer in [*met, *layers]}, error


def _listing(module: nn.Module, layers: dict[nn.Module, str]) -> dict[str, Any]:
    """Number of parameters in all, and the name and description of each layer."""
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "layers": [[name, what(layer)] for layer, name in layers.items()],
    }


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
                ("dilation", layer.dilation, (1, 1)),
                ("groups", layer.groups, 1),
            )
            if value != usual
        ]
        text = (
            f"{kernel[0]}x{kernel[1]} convolution {channels}{''.join(details)}{bias or ', no bias'}"
        )
        return re.sub(r"\((\d+), \1\)", r"\1", text)
    if isinstance(layer, NORMS):
        size = getattr(layer, "num_features", None) or getattr(layer, "normalized_shape", "")
        eps = "" if layer.eps == 1e-5 else f", eps {layer.eps:g}"
        return f"{type(layer).__name__} {size}{eps}"
    shapes = [tuple(p.shape) for p in layer._parameters.values() if p is not None]
    return f"{type(layer).__name__} with {shapes}"


def _padding(layer: nn.Conv2d) -> tuple[int, ...] | int:
    padding = layer.padding
    if padding == "valid":
        padding = (0, 0)
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size))
    return 0 if padding == (0, 0) else padding


@torch.no_grad()
def fill(module: nn.Module, layers: list[nn.Module], seed: int, zero: bool = False) -> None:
    """Random parameters and running statistics by the rule above; with `zero`, zeros and fresh
    statistics.

    A norm is known by the layer that ran before it: two branches may run in either order. A bias in
    front of a
    norm stays zero: the norm would take it away again, and who left one on shall lose the points
    for that alone.
    """
    counts: Counter[tuple] = Counter()
    previous: tuple = ()

    def draw(key: tuple, role: str, like: Tensor) -> Tensor:
        digest = hashlib.sha256(f"{seed} {key} {role}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(like.shape, generator=generator)

    for position, layer in enumerate(layers):
        norm = isinstance(layer, NORMS)
        weight = layer._parameters.get("weight")
        if norm:
            key: tuple = ("norm", *previous)
        else:
            shapes = [list(p.shape) for p in layer._parameters.values() if p is not None]
            # (out, in, 1, 1) of a convolution is (out, in) of a linear layer.
            shape = list(weight.shape) if weight is not None else shapes
            key = (str(shape[:2] if shape[2:] == [1, 1] else shape),)
        counts[key] += 1
        key = (*key, counts[key])
        after = layers[position + 1] if position + 1 < len(layers) else None
        for role, p in layer._parameters.items():
            if p is None:
                continue
            noise = draw(key, role, p)
            if zero or (role == "bias" and isinstance(after, NORMS) and not norm):
                p.zero_()
            elif norm:
                p.copy_(1 + 0.3 * noise.clamp(-2, 2) if role == "weight" else 0.3 * noise)
            elif role == "weight" and p.dim() > 1:
                p.copy_(noise * (2 / p[0].numel()) ** 0.5)
            else:
                p.copy_(0.2 + 0.3 * noise.abs())  # positive, so that few ReLUs are dead
        for role, buffer in layer._buffers.items():
            if norm and buffer is not None:
                noise = draw(key, role, buffer)
                fresh = {"running_mean": 0.0, "running_var": 1.0}.get(role, 0)
                if role == "num_batches_tracked" or zero:
                    buffer.fill_(fresh)
                else:
                    buffer.copy_(0.3 * noise if role == "running_mean" else (0.5 * noise).exp())
        previous = key
