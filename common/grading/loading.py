"""Put a submission together in a worker: read it, refuse what it may not take, fit the parts in."""

from __future__ import annotations
import __future__

import ast
import base64
import builtins
import contextlib
import difflib
import io
import json
import marshal
import os
import re
import sys
import tokenize
import types
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import nn

from common.grading.holes import definitions

# What a submission may not take its models from.
FORBIDDEN = {
    "torchvision.models": "torchvision's models",
    "torchvision.ops": "torchvision's layers",
    "torch.hub": "models from the network",
    "timm": "timm",
    "common.lessons": "the course's own lessons",
    "common.grading": "the grader",
    "common.grade": "the grader",
}
LESSON_NAME = re.compile(r"\d\d_\w+")
LESSON_FILE = re.compile(r"\d\d_\w+\.(py|[\w.-]+\.pyc)")


class Trouble(Exception):
    """Something to tell the student, in one line."""


def decode(data: bytes) -> str:
    """Source text by Python's own rule: UTF-8, or what one of the first two lines declares."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        text = data.decode(errors="surrogateescape")
        broken = re.search("[\udc80-\udcff]", text)
        bad = text.count("\n", 0, broken.start()) + 1 if broken else 1
        raise Trouble(
            f"not readable as text: line {bad} is not UTF-8 and the file declares no other "
            "encoding; save it as UTF-8"
        ) from None
    if "\0" in text:
        raise Trouble("not readable as text: the file holds zero bytes; save it as UTF-8")
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)


# ------------------------------------------------------------------------------- what is refused


def refuse_imports(nodes: list[ast.AST], forbidden: dict[str, str], allowed: set[str]) -> None:
    """Raises: Trouble, at the first place where a finished model is taken from elsewhere, unless
    the reference takes it too.
    """
    for node in nodes:
        for name in names_taken(node):
            sources = [what for k, what in forbidden.items() if f"{name}.".startswith(f"{k}.")]
            if LESSON_NAME.match(name):
                sources = ["a lesson of the course"]
            if sources and name not in allowed:
                raise Trouble(
                    f"not allowed: line {node.lineno} takes from {sources[0]} ({name}); "
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


def lock_doors(solution: str) -> None:
    """The same rule for what the source does not show; `solution` is the module that the exercise
    comes from. It stops the idle, not the determined: see the docs.
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
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Placeholders())
    sys.modules["timm"] = None  # type: ignore[assignment]  # importing it raises ImportError
    sys.modules.pop(solution, None)


class _Placeholders(MetaPathFinder, Loader):
    """In place of torchvision stands something that can be imported, and not used."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        ours = name.partition(".")[0] == "torchvision"
        return ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Locked(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Locked(ImportError):
    """Something was called that no model needs: transforms, data sets, what is not installed."""


class _Locked(types.ModuleType):
    """A module, or a name in it, that gives more of its like and can't be called."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Locked(f"{self.__name__}.{name}")

    def __call__(self, *args: object, **options: object) -> object:
        name = self.__name__
        if name.partition(".")[0] != "torchvision":
            raise Locked(f"{name} is not there when submissions are marked", name=name)
        kind = ImportError if name.startswith(tuple(FORBIDDEN)) else Locked
        raise kind(f"not allowed: a submission may not use {name}", name=name)

    def __mro_entries__(self, bases: tuple) -> tuple:
        return ()  # as the base of a class that no exercise is about


class Seal:
    """Notices when a submission puts something of its own in place of torch's or Python's."""

    def __init__(self, *more: Any) -> None:
        watched = [
            *(json, json.encoder, json.JSONEncoder, base64, builtins, np, torch, torch.Tensor),
            *(torch.nn.functional, torch.nn.init, nn, nn.Module, nn.Sequential, nn.ModuleList),
            *(nn.Conv2d, nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm),
            *(nn.modules.batchnorm._NormBase, nn.BatchNorm2d, nn.LayerNorm, nn.Dropout, nn.ReLU),
            *(torch.overrides, os, *more),
        ]
        self.seen = [
            (owner, name, value, getattr(value, "__code__", None))
            for owner in watched
            for name, value in vars(owner).items()
            if name != "Storage"  # it follows the default dtype
            and (callable(value) or isinstance(value, (property, staticmethod, classmethod)))
        ]

    def check(self) -> None:
        """Raises: Trouble, naming the first thing that was changed."""
        for owner, name, value, code in self.seen:
            same = owner.__dict__.get(name) is value
            if not same or (code is not None and value.__code__ is not code):
                where = f"{getattr(owner, '__name__', owner)}.{name}"
                raise Trouble(
                    f"not allowed: the submission changes {where}; leave torch and Python as they "
                    "are"
                )


# --------------------------------------------------------------------------- putting it together


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
    itself forgot: without `import torch.nn.functional as F` it would work here and nowhere else.
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


def unpack(code: str) -> types.CodeType:
    """What `marking.grafts` packed: compiled, so that no source of another exercise is here."""
    return marshal.loads(base64.b64decode(code))


def run_with_grafts(
    tree: ast.Module,
    filename: str,
    namespace: dict[str, Any],
    replace: dict[str, str],
    lacking: dict[str, str],
    number: str,
    others: list[str],
) -> None:
    """Run the submission, with the reference's in place of other exercises'. Statement by
    statement, because each code object carries one file name: no message shall quote grafted text
    as the student's.

    A statement that uses the parts of other exercises (`others`), and what is made of them, may
    fail: they may be wrong, or the reference's, with layers of other names. So may one that uses
    what can't be made here: a data set of torchvision, a plot by a library that is not installed.
    """
    later, uses_others = [], set(others)
    grafted: dict[str, tuple[Any, dict[str, Any]]] = {}  # and what is in them
    namespace["get_ipython"] = _Locked("IPython")  # a notebook that was saved as a script has it
    for node, code in _statements(tree, filename, replace, lacking):
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name)] if node else []
        uses = any(n.id in uses_others for n in names)
        defines = isinstance(node, (ast.ClassDef, ast.FunctionDef))
        may_fail = uses and not defines
        imports = isinstance(node, (ast.Import, ast.ImportFrom))
        made = {node.name} if defines else {n.id for n in names if isinstance(n.ctx, ast.Store)}
        if imports:
            made = {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        uses_others = uses_others | made if uses else uses_others - made | set(others)
        try:
            exec(code, namespace)
            if node and code.co_filename == "<reference>":
                grafted |= {name: (namespace[name], {**vars(namespace[name])}) for name in made}
        except NameError:
            if node and not may_fail:
                raise
            if node is None:
                later.append(code)  # what the submission lacks may need what comes further down
        except (Locked, ModuleNotFoundError) as error:
            if not imports and not isinstance(error, Locked):
                raise
            namespace.update(dict.fromkeys(made, _Locked(error.name)))  # what needs it will say so
            uses_others |= made
        except NotImplementedError as error:
            hole = str(error)  # another exercise's, which this doesn't need
            own = not hole.startswith("Exercise") or hole.startswith(f"Exercise {number}:")
            if own and not may_fail:
                raise
        except Exception:
            if not may_fail:
                raise
    for code in later:
        with contextlib.suppress(Exception):
            exec(code, namespace)
    for name, (part, before) in grafted.items():  # whatever came later in their place
        namespace[name] = part
        for key, value in [*vars(part).items()]:
            if key not in before and callable(value):
                delattr(part, key)
        for key, value in before.items():
            if vars(part).get(key) is not value:
                setattr(part, key, value)
    for name, code in replace.items():
        owner, _, method = name.rpartition(".")
        mine = namespace.get(owner)
        if isinstance(mine, type):
            exec(unpack(code), namespace)  # a class of that name, with nothing but the method
            function = vars(namespace[owner])[method]
            for cell in getattr(function, "__closure__", None) or ():  # a static method has none
                cell.cell_contents = mine  # what super() means in it
            namespace[owner] = mine
            setattr(mine, method, function)


def _statements(
    tree: ast.Module, filename: str, replace: dict[str, str], lacking: dict[str, str]
) -> Iterator[tuple[ast.stmt | None, types.CodeType]]:
    """With its code comes each statement of the submission; None with what stands in for what it
    lacks: that comes behind the imports.
    """
    future = __future__.annotations.compiler_flag
    declared = any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)

    def code(node: ast.stmt) -> types.CodeType:
        names = [*definitions([node])]
        if len(names) == 1 and names[0] in replace:
            return unpack(replace[names[0]])
        module = ast.Module([node], [])
        return compile(module, filename, "exec", flags=future * declared, dont_inherit=True)

    top = (ast.Expr, ast.Import, ast.ImportFrom)
    imports = list(takewhile(lambda node: isinstance(node, top), tree.body))
    own = definitions(tree.body)
    yield from ((node, code(node)) for node in imports)
    yield from ((None, unpack(text)) for name, text in lacking.items() if name not in own)
    yield from ((node, code(node)) for node in tree.body[len(imports) :])
