"""Live cells: each runs, shows something, and is nothing in a script."""

from __future__ import annotations

import ast

import pytest
import torch

from common import live
from tests.conftest import LESSONS, ROOT, lesson

CELLS = [
    pytest.param(name, node, id=f"{name[:2]}-{node.lineno}")
    for name in LESSONS
    for node in ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.If) and ast.unparse(node.test) == "live()"
]


@pytest.mark.parametrize(("name", "node"), CELLS)
def test_a_live_cell_shows_something(
    name: str, node: ast.If, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shown: list[object] = []
    monkeypatch.setattr(live, "display", shown.append)
    torch.manual_seed(0)
    body = compile(ast.Module(node.body, []), f"{name}.py", "exec")
    exec(body, dict(vars(lesson(name[:2]))))  # a copy: the lesson's own names stay
    assert shown or capsys.readouterr().out


def test_digits_are_real_and_in_order() -> None:
    from sklearn.datasets import load_digits

    images = load_digits().images
    x = live.digits(11)
    assert x.shape == (11, 3, 8, 8) and x.min() == -1 and x.max() == 1
    grey = ((x[10, 0].double() + 1) * 8).round()  # scikit-learn's levels are 0 to 16
    assert any(torch.equal(grey, torch.from_numpy(image)) for image in images)
    assert live.digits(2, size=32).shape == (2, 3, 32, 32)
    assert not live.live()  # nobody steps through pytest
