"""Cut the bodies of exercises out of a lesson's source, and put others in their place."""

from __future__ import annotations

import ast
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.grading.exercises import Exercise


def take_out(source: str, chosen: list[Exercise]) -> str:
    """`source` with the body of every part of the exercises replaced by a NotImplementedError.

    Raises: ValueError, if a part is not in the source.
    """
    lines = source.splitlines()
    tree = ast.parse(source)
    messages: dict[ast.FunctionDef, list[str]] = {}
    for exercise in chosen:
        for part in exercise.parts:
            for function in functions_of(tree, part):
                # Two exercises may be about the same part: a block, and the block with BatchNorm.
                messages.setdefault(function, []).append(
                    f"Exercise {exercise.number}: {exercise.hint}"
                )
    for function in sorted(
        messages, key=lambda f: -f.lineno
    ):  # from the end, so that line numbers stay true
        _empty(lines, function, " ".join(messages[function]))
    return "\n".join(lines) + "\n"


def replace_part(source: str, part: str, code: str) -> str:
    """`source` with one class, function or method replaced by `code`.

    Raises: ValueError, if there is no such thing.
    """
    owner, _, method = part.partition(".")
    indent = " " * 4 * bool(method)
    try:
        node = next(n for n in ast.parse(source).body if getattr(n, "name", None) == owner)
        if method:
            node = next(n for n in node.body if getattr(n, "name", None) == method)
    except StopIteration:
        raise ValueError(f"the lesson has no {part}") from None
    lines = source.splitlines()
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    new = textwrap.indent(textwrap.dedent(code).strip(), indent)
    lines[first - 1 : node.end_lineno] = new.splitlines()
    return "\n".join(lines) + "\n"


def put_in(source: str, code: str) -> str:
    """`source` with all that `code` defines in place of what has the same names.

    A class without bases stands for its methods alone: `class Block:` with a `forward` changes
    only that.
    """
    for node in ast.parse(code).body:
        if isinstance(node, ast.ClassDef) and not node.bases:
            for method in node.body:
                source = replace_part(source, f"{node.name}.{method.name}", ast.unparse(method))
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            source = replace_part(source, node.name, ast.unparse(node))
    return source


def functions_of(tree: ast.Module, part: str) -> list[ast.FunctionDef]:
    """What a manifest's part stands for: one function, one method, or all methods of a class.

    Raises: ValueError, if there is no such thing.
    """
    owner, _, method = part.partition(".")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == part:
            return [node]
        if isinstance(node, ast.ClassDef) and node.name == owner:
            methods = [
                n for n in node.body if isinstance(n, ast.FunctionDef) and method in ("", n.name)
            ]
            if methods:
                return methods
    raise ValueError(f"the lesson has no {part}")


def _empty(lines: list[str], function: ast.FunctionDef, message: str) -> None:
    """Replace the function's body in `lines`; keep its docstring."""
    first = function.body[0]
    docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    indent = " " * (function.col_offset + 4)
    body = [indent + line for line in _raise(message, 100 - len(indent))]
    if docstring:
        start = first.end_lineno
    elif first.lineno == function.lineno:  # def f(): return 1
        line = lines[first.lineno - 1]
        lines[first.lineno - 1] = line[: first.col_offset].rstrip()
        start = first.lineno
    else:
        start = _header_end(lines, function)
    lines[start : function.end_lineno] = body


def _header_end(lines: list[str], function: ast.FunctionDef) -> int:
    """Number of lines down to the colon that ends the signature. Comments below it belong to the
    body.
    """
    end = function.body[0].lineno - 1
    while end > function.lineno and not lines[end - 1].split("#")[0].rstrip().endswith(":"):
        end -= 1
    return end


def _raise(message: str, width: int) -> list[str]:
    """`raise NotImplementedError(message)` in lines of at most `width` characters."""
    line = f"raise NotImplementedError({_quoted(message)})"
    if len(line) <= width:
        return [line]
    pieces, piece = [], ""
    for word in message.split(" "):
        if len(_quoted(piece + word)) + 5 > width:
            pieces.append(piece)
            piece = ""
        piece += word + " "
    pieces.append(piece.rstrip())
    return ["raise NotImplementedError(", *(f"    {_quoted(piece)}" for piece in pieces), ")"]


def _quoted(text: str) -> str:
    return (
        "'" + text + "'"
        if '"' in text and "'" not in text
        else '"' + text.replace('"', '\\"') + '"'
    )
