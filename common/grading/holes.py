"""Cut the bodies of exercises out of a lesson's source, and put others in their place."""

from __future__ import annotations

import ast
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.grading.exercises import Exercise


def take_out(source: str, chosen: Iterable[Exercise]) -> str:
    """`source` with the body of every part of the exercises replaced by a NotImplementedError.

    Raises: ValueError, if a part is not in the source.
    """
    lines = source.splitlines()
    tree = ast.parse(source)
    messages: dict[ast.FunctionDef, list[str]] = {}
    for exercise in chosen:
        message = f"Exercise {exercise.number}: {exercise.hint}"
        for part in exercise.parts:
            for function in functions_of(tree, part):
                # Two exercises may be about the same part: a block, and the block with BatchNorm.
                messages.setdefault(function, []).append(message)
    # From the end, so that line numbers stay true.
    for function in sorted(messages, key=lambda f: -f.lineno):
        _empty(lines, function, " ".join(messages[function]))
    return "\n".join(lines) + "\n"


def put_in(source: str, code: str) -> str:
    """`source` with all that `code` defines in place of what has the same names.

    A class without bases stands for its methods alone: `class Block:` with a `forward` changes
    only that.

    Raises: ValueError, if a name is not in the source.
    """
    for node in ast.parse(code).body:
        if isinstance(node, ast.ClassDef) and not node.bases:
            for method in node.body:
                source = _replaced(source, f"{node.name}.{method.name}", method)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            source = _replaced(source, node.name, node)
    return source


def definitions(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Name -> statement, for what the body of a module or class defines or assigns."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            found.update({n.id: node for n in names if isinstance(n.ctx, ast.Store)})
    return found


def _replaced(source: str, part: str, new: ast.stmt) -> str:
    lines, old = source.splitlines(), _find(ast.parse(source), part)
    first = min([old.lineno, *(decorator.lineno for decorator in old.decorator_list)])
    text = textwrap.indent(ast.unparse(new), " " * old.col_offset)
    lines[first - 1 : old.end_lineno] = text.splitlines()
    return "\n".join(lines) + "\n"


def functions_of(tree: ast.Module, part: str) -> list[ast.FunctionDef]:
    """What a manifest's part stands for: one function, one method, or all methods of a class.

    Raises: ValueError, if there is no such thing.
    """
    node = _find(tree, part)
    if isinstance(node, ast.ClassDef):
        return [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
    return [node]


def _find(node: ast.Module, part: str) -> ast.ClassDef | ast.FunctionDef:
    for name in part.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == name), None)
        if node is None:
            raise ValueError(f"the lesson has no {part}")
    return node


def _empty(lines: list[str], function: ast.FunctionDef, message: str) -> None:
    """Replace the function's body in `lines`; keep its docstring."""
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        start = first.end_lineno
    else:  # Behind the colon that ends the signature: comments below it belong to the body.
        start = first.lineno - 1
        while not lines[start - 1].split("#")[0].rstrip().endswith(":"):
            start -= 1
    indent = " " * (function.col_offset + 4)
    lines[start : function.end_lineno] = [indent + x for x in _raise(message, 100 - len(indent))]


def _raise(message: str, width: int) -> list[str]:
    """`raise NotImplementedError(message)` in lines of at most `width` characters."""
    line = f"raise NotImplementedError({_quoted(message)})"
    if len(line) <= width:
        return [line]
    *pieces, last = textwrap.wrap(
        message, width - 7, break_long_words=False, break_on_hyphens=False
    )
    strings = [_quoted(piece + " ") for piece in pieces] + [_quoted(last)]
    return ["raise NotImplementedError(", *(f"    {string}" for string in strings), ")"]


def _quoted(text: str) -> str:
    quote = "'" if '"' in text and "'" not in text else '"'
    return quote + text.replace(quote, "\\" + quote) + quote
