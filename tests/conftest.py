"""What the tests share: lessons by number, small
image folders, the command line in this process.
"""

from __future__ import annotations

import gc
import html
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from common.grade import Grader

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted(p.stem for p in ROOT.glob("0[1-8]_*.py"))

torch.set_num_threads(1)  # several test processes share the cores


def _only_real(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """On the meta device there are no numbers to draw, but torch works out in Python what they
    would be drawn into: a fifth of the time of the tests that build the large models.
    """
    return lambda weights, *args, **kw: weights if weights.is_meta else draw(weights, *args, **kw)


torch.Tensor.normal_ = _only_real(torch.Tensor.normal_)
torch.Tensor.uniform_ = _only_real(torch.Tensor.uniform_)


def pytest_collection_finish() -> None:
    """Torch and the lessons are there to stay: the garbage collector need not look at them."""
    gc.collect()
    gc.freeze()


def lesson(number: str) -> ModuleType:
    """The lesson whose file name begins with `number`."""
    return importlib.import_module(next(name for name in LESSONS if name.startswith(number)))


def seen_in_browser(folder: Path, page: str) -> object:
    """What a page's script leaves as JSON in <pre id="seen">, in a window of 1280 x 720."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("no Chromium here (Debian: apt-get install chromium) to open the page in")
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --dump-dom"
    command = [browser, *flags.split(), "--window-size=1280,720"]
    command += [f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom)
    assert found, "the page's script did not run to its end"
    return json.loads(html.unescape(found[1]))


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes DIR[/split]/CLASS/N.png of noise whose mean colour tells the class."""
    from PIL import Image

    def make(
        classes: tuple[str, ...] = ("cat", "dog", "eel"),
        per_class: int = 12,
        size: int = 16,
        splits: tuple[str, ...] = ("",),
        name: str = "images",
    ) -> Path:
        generator = np.random.default_rng(0)
        for split in splits:
            for label, kind in enumerate(classes):
                folder = tmp_path / name / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(per_class):
                    pixels = generator.integers(0, 100, (size, size, 3))
                    pixels[..., label % 3] += 120
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        return tmp_path / name

    return make


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of a short run's time, and other tests draw them."""
    from common import plotting

    for name in LESSONS:
        monkeypatch.setattr(lesson(name[:2]), "draw_figures", lambda *parts: None, raising=False)
    monkeypatch.setattr(lesson("08"), "feature_map", lambda *parts: plotting.panels(1)[0])


@pytest.fixture(scope="session")
def warm_grader() -> Iterator[Grader]:
    """One for all tests of a process: its host, and what it has seen of the lessons, is what costs.
    The seed of a real run is drawn anew.
    """
    from common import grade

    with grade.Grader(grade.parse_lessons(None), references=grade.References(seed=1)) as grader:
        yield grader


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable:
    """`cli("01", "--epochs", "0")` -> (exit code, stdout, stderr), without a new interpreter."""
    from common import profiling

    passes = profiling.time_passes  # 5 of them and not 50: no test asks how long they take
    monkeypatch.setattr(
        profiling, "time_passes", lambda model, x, *_, **__: passes(model, x, seconds=0.0)
    )

    def call(number: str, *argv: str) -> tuple[int, str, str]:
        module = lesson(number)
        script = f"{module.__name__}.py"
        monkeypatch.setattr(sys, "argv", [script, "--run-dir", str(tmp_path / "runs"), *argv])
        code = 0
        try:
            config = module.parse_flags(module.Config)
            # Lesson 7 takes a list of names and checks it itself.
            models = {config.model: None} if number == "07" else module.MODELS
            module.main(config, models, module.build, module.run, module.EXPERIMENTS)
        except SystemExit as leaving:
            code = leaving.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call
