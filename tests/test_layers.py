"""The floors of common/: imports go down only, and in no circle."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOORS = {"starter", "grade", "bundle", "notebook", "slides", "index", "kit"}
FLOORS = {"engine": 0, "top": 1, "comparison": 2, "transfer": 2, "grading": 2, "door": 3}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "common").rglob("*.py"))
}


def floor(module: str) -> int:
    _, first, *_ = [*module.split("."), ""]
    folder = first if (ROOT / "common" / first).is_dir() and first else ""
    return FLOORS[folder or ("door" if first in DOORS else "top")]


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of common/ that a module imports, wherever in it; not those of type hints alone."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    hints = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name for name in names if name in MODULES}
    return frozenset(found - {"common", module})


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    if module == "common":
        return
    up = [other for other in imports(module) if floor(other) > floor(module)]
    assert not up, f"{module} imports {up} from a floor above it"


def test_no_import_comes_back_to_where_it_began() -> None:
    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in imports(module):
                walk(other, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in MODULES:
        if module != "common":
            walk(module, ())


def test_no_module_looks_for_another_in_sys_modules() -> None:
    looks = re.compile(r"""sys\.modules(\.get\(|\[)\s*f?["']common""")
    assert not [module for module, path in MODULES.items() if looks.search(path.read_text())]


def test_what_a_student_opens_is_small() -> None:
    """A lesson's `run()` and what it calls, without the engine: seven files, 1,300 lines."""
    opened = "data training schedule evaluation profiling runs pretrained".split()
    lines = {n: len((ROOT / f"common/{n}.py").read_text().splitlines()) for n in opened}
    assert sum(lines.values()) <= 1300, lines
    assert lines["training"] <= 350 and lines["data"] <= 350, lines
