"""What a user meets on the command line: bad input in
one line, exit codes, help at once, no side effects.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import sklearn.datasets
import torch

from common.cli import exit_codes
from common.engine import sources
from common.engine.errors import UserError
from tests.conftest import LESSONS, ROOT, lesson
from tests.warm import Warm

STANDARD_FLAGS = (
    "--model --dataset --data-dir --epochs --batch-size --lr --device --no-amp --compile --seed "
    "--workers "
    "--run-dir --resume --pretrained --accumulate --patience --augment --summary --experiment"
).split()
RESULT_KEYS = (
    "lesson model dataset device amp seed epochs params macs val_top1 test_top1 test_top5 "
    "per_class "
    "train_seconds images_per_second torch_version"
).split()


def python(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def documented_flags() -> Iterator[tuple[str, list[str]]]:
    """Every command line of a lesson that the documentation and the lessons themselves show."""
    pages = [
        path for folder in (".", "docs", "common/weights") for path in ROOT.glob(f"{folder}/*.md")
    ]
    for path in [*pages, *ROOT.glob("0*.py")]:
        text = re.sub(r"\\+\n[# ]*", " ", path.read_text(encoding="utf-8"))  # continued lines
        for name, flags in re.findall(r"python (0\d_\w+)\.py((?: +[^\s`|#)]+)*)", text):
            yield name, flags.split()
        if path.stem in LESSONS:  # its own flags, in backticks, perhaps over two lines
            for flags in re.findall(r"`(--[^`]+)`", re.sub(r"\n# *", " ", text)):
                yield path.stem, flags.split()


def test_documented_flags_and_experiments_exist() -> None:
    shown = list(documented_flags())
    assert {name for name, _ in shown} == set(LESSONS) and len(shown) > 100
    for name, words in shown:
        module = lesson(name[:2])
        known = {"--help", "--from"} | {f"--{f.name}" for f in fields(module.Config)}
        known |= {f"--no-{f.name}" for f in fields(module.Config) if isinstance(f.default, bool)}
        known = {flag.replace("_", "-") for flag in known}
        assert {word for word in words if word.startswith("--")} <= known, (name, words)
        if "--experiment" in words[:-1]:
            assert words[words.index("--experiment") + 1] in {*module.EXPERIMENTS, "..."}, words


@pytest.mark.parametrize("name", LESSONS)
def test_help_has_every_standard_flag_and_needs_no_torch(name: str) -> None:
    """A torch that can't be imported proves that nothing heavy is loaded before the answer."""
    code = (
        f"import sys, runpy; sys.modules['torch'] = None; sys.argv = ['{name}.py', "
        f"'--help']; runpy.run_path('{name}.py', run_name='__main__')"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    missing = [flag for flag in STANDARD_FLAGS if flag not in done.stdout]
    assert missing == []


def test_importing_lessons_does_nothing(tmp_path: Path) -> None:
    code = (
        f"import os, sys, importlib; sys.path.insert(0, {str(ROOT)!r}); "
        f"os.chdir({str(tmp_path)!r});"
        f"[importlib.import_module(name) for name in {LESSONS!r}];"
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'sklearn' not in sys.modules"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "resnet19"], "unknown model 'resnet19' (did you mean resnet"),
        (["--dataset", "cifra10"], "unknown dataset 'cifra10' (did you mean cifar10?)"),
        (["--experiment", "skip"], "unknown experiment 'skip' (did you mean skip-connections?)"),
        (["--epochs", "0"], "--epochs 0"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--lr", "-1"], "--lr -1"),
        (["--frobnicate"], "--frobnicate"),
        (["--device", "cuda"], "no CUDA GPU"),
        (["--device", "toaster"], "not a device"),
        (["--dataset", "folder", "--data-dir", "/nowhere"], "no such folder"),
        (["--resume", "/nowhere"], "no such run folder"),
        (["--shortcut", "Z"], "unknown shortcut 'Z'"),
        (["--shortcut", "A", "--model", "plainnet18"], "--shortcut A: plainnet18 has no such"),
        (["--shortcut", "A", "--model", "resnet9"], "--shortcut A: resnet9 has no such thing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(cli: Callable, flags: list, message: str) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = cli("01", *flags)
    assert code == 2 and message in err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1


def test_too_little_memory_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as leaving, exit_codes():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert leaving.value.code == 2 and "too little memory" in capsys.readouterr().err


def test_a_folder_is_judged_at_the_size_that_it_is_trained_at(
    cli: Callable, image_folder: Callable, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    """500 images of 224 px need 16 GiB, the same of 16 px some tens of MiB."""
    folder = image_folder(per_class=200)
    flags = "--dataset folder --model resnet9 --recipe fast --device cpu --data-dir".split()
    monkeypatch.setattr("common.limits.memory", lambda device: 2**30)
    code, _, err = cli("01", *flags, str(folder), "--smoke")
    assert code == 0, err
    code, _, err = cli("01", *flags, str(folder), "--image-size", "224")
    assert code == 2 and "GiB of memory" in err


def test_a_folder_is_listed_once_a_start(
    cli: Callable, image_folder: Callable, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    listed, scan = [], sources._scan
    monkeypatch.setattr(sources, "_scan", lambda folder: listed.append(folder.name) or scan(folder))
    flags = "--dataset folder --model resnet20 --device cpu --smoke --seed 1 --data-dir".split()
    folder = image_folder(splits=("train", "test"))
    for starts in (1, 2):  # and anew by what comes later
        assert cli("01", *flags, str(folder))[0] == 0
        assert listed == ["train", "test"] * starts


def test_summary_of_too_small_an_image_is_one_line(cli: Callable) -> None:
    code, _, err = cli("03", "--model", "inception_v3", "--image-size", "70", "--summary")
    assert code == 2 and "makes nothing of so small an image" in err and err.count("\n") == 1


def test_unwritable_run_folder_stops_before_training(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, out, err = cli("01", "--dataset", "digits", "--run-dir", str(tmp_path / "file"))
    assert code == 2 and "--run-dir" in err and "epoch" not in out


def test_pretrained_without_network_names_the_file(cli: Callable, tmp_path: Path) -> None:
    os.environ["TORCH_HOME"] = str(tmp_path)
    os.environ["https_proxy"] = os.environ["HTTPS_PROXY"] = "http://127.0.0.1:9"
    try:
        flags = ["--dataset", "digits", "--pretrained", "--device", "cpu", "--smoke"]
        code, _, err = cli("01", *flags, "--model", "resnet18")
        assert code == 2 and "can't be downloaded" in err and "by hand" in err
        code, _, err = cli("01", *flags, "--model", "plainnet18")
        assert code == 2 and "torchvision has no weights" in err
    finally:
        for name in ("TORCH_HOME", "https_proxy", "HTTPS_PROXY"):
            os.environ.pop(name, None)


def recounted(run: Path) -> float:
    """The share of digits that the saved weights get right, without a line of common/."""
    best = torch.load(run / "best.pt", weights_only=True)
    net = lesson("01").cifar_resnet(20, num_classes=10)
    net.load_state_dict(best["model"])
    net.eval()
    digits = sklearn.datasets.load_digits()
    generator, rows = torch.Generator().manual_seed(0), []
    for label in range(10):  # the fixed fifth of each class
        of_class = (torch.from_numpy(digits.target) == label).nonzero().squeeze(1)
        shuffled = of_class[torch.randperm(len(of_class), generator=generator)]
        rows.append(shuffled[: round(0.2 * len(of_class))])
    rows = torch.cat(rows)
    x = torch.from_numpy(digits.images[rows] * 255 / 16).round().float().div(255)
    x = (x[:, None].repeat(1, 3, 1, 1) - best["mean"].view(3, 1, 1)) / best["std"].view(3, 1, 1)
    with torch.no_grad():
        right = net(x).argmax(1) == torch.from_numpy(digits.target[rows])
    return right.double().mean().item()


def test_a_run_in_miniature(cli: Callable, tmp_path: Path, no_figures: None) -> None:
    """The command as a user types it, in a process of its own, with no terminal."""
    code, out, err = Warm(
        tmp_path, "01_resnet_beginner.py", "--dataset", "digits", "--model", "resnet20",
        "--epochs", "2", "--device", "cpu", "--run-dir", str(tmp_path / "runs"),
    ).join()  # fmt: skip
    assert code == 0, err
    (run,) = (tmp_path / "runs" / "01_resnet_beginner").iterdir()
    files = {p.name for p in run.iterdir()}
    assert files >= {
        "config.json",
        "history.csv",
        "result.json",
        "last.pt",
        "best.pt",
        "report.html",
    }
    assert len([f for f in files if f.endswith(".png")]) >= 6
    result = json.loads((run / "result.json").read_text())
    assert set(RESULT_KEYS) <= set(result)
    assert result["params"] == 269_722 and result["epochs"] == 2
    assert result["test_top1"] == recounted(run), "by another path, from best.pt alone"
    assert len(result["per_class"]) == 10
    assert len((run / "history.csv").read_text().splitlines()) == 3
    for word in ("device ", "data ", "model ", "recipe ", "expected ", "epoch 1/2", "test "):
        assert word in out
    assert "\r" not in out and err == ""

    code, _, err = cli("01", "--resume", str(run))
    assert code == 0, err
    repeated = json.loads((run / "result.json").read_text())
    assert repeated["test_top1"] == result["test_top1"], "a finished run is only tested again"


def test_same_seed_same_result(cli: Callable, tmp_path: Path, no_figures: None) -> None:
    tops = []
    for _ in range(2):
        code, _, err = cli(
            "01", "--dataset", "digits", "--model", "resnet20", "--epochs", "1", "--device", "cpu"
        )
        assert code == 0, err
    for result in sorted((tmp_path / "runs").rglob("result.json")):
        tops.append(json.loads(result.read_text())["test_loss"])
    assert tops[0] == tops[1]


@pytest.mark.parametrize("name", [n for n in LESSONS if n[:2] < "07"])
def test_summary_adds_up(cli: Callable, name: str) -> None:
    code, out, err = cli(name[:2], "--summary", "--dataset", "cifar10")
    assert code == 0, err
    total = next(line for line in out.splitlines() if line.startswith("total")).split()
    with torch.device("meta"):
        module = lesson(name[:2])
        config = module.Config().resolve("cifar10")
        model = module.build(config, 10)
    assert int(total[-2].replace(",", "")) == sum(p.numel() for p in model.parameters())
    assert "thop counts" in out


def test_folder_with_broken_image_is_named(cli: Callable, image_folder: Callable) -> None:
    folder = image_folder()
    (folder / "cat" / "torn.png").write_bytes(b"\x89PNG nonsense")
    code, _, err = cli("01", "--dataset", "folder", "--data-dir", str(folder), "--workers", "0")
    assert code == 2 and "torn.png" in err and len(err.strip().splitlines()) == 1


def test_ctrl_c_before_and_after_training(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = lesson("01")
    flags = ["--dataset", "digits", "--model", "resnet20", "--device", "cpu", "--smoke"]

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_data", interrupt)
        patch.setattr("common.engine.run_folder.RunFolder.current", None)
        code, _, err = cli("01", *flags)
        assert code == 130 and "nothing to resume" in err
    with monkeypatch.context() as patch:
        patch.setattr(module, "draw_figures", interrupt)
        code, _, err = cli("01", *flags)
        assert code == 130 and "--resume" in err


def test_an_elastic_restart_goes_on_with_its_own_run(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    """torchrun starts its processes again with the flags of the first time."""
    flags = ["--dataset", "digits", "--model", "resnet20", "--device", "cpu", "--smoke"]
    assert cli("01", *flags)[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    code, out, _ = cli("01", *flags)
    assert code == 0 and "resume     after 1 epochs" in out
    assert cli("01", *flags, "--seed", "1")[0] == 0, "another setting is another run"
    assert len(list((tmp_path / "runs" / "01_resnet_beginner").iterdir())) == 2


@pytest.mark.parametrize("name", LESSONS)
def test_every_number_has_finite_bounds_on_both_sides(name: str) -> None:
    kind = lesson(name[:2]).Config
    types = get_type_hints(kind)
    for spec in fields(kind):
        low, high = spec.metadata.get("low"), spec.metadata.get("high")
        numeric = {int, float} & {types[spec.name], *get_args(types[spec.name])}
        if numeric or low is not None:
            assert low is not None and high is not None, f"--{spec.name} has no bounds"
            assert math.isfinite(low) and math.isfinite(high) and low < high, spec.name
            kind(**{spec.name: low if numeric else str(low)}) if low else None
            for beyond in (math.nan, math.inf, -math.inf, high + 1, low - 1):
                with pytest.raises(UserError, match=r"makes sense is|wants int"):
                    kind(**{spec.name: beyond if numeric else str(beyond)})


# ------------------------------------------------------------------- output that nobody can take


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a Linux device")
@pytest.mark.parametrize(
    ("redirect", "codes", "lines"),
    [
        ("--summary --dataset digits > /dev/full", {2}, 1),
        ("--help > /dev/full", {2}, 1),
        ("--summary --dataset digits 2>&-", {0}, 0),
        ("--epochs 0 2>&-", {2}, 0),
        ("--summary --dataset digits | head -1 > /dev/null; exit ${PIPESTATUS[0]}", {0, 141}, 0),
        ("--summary --dataset digits >&-", {0}, 0),
    ],
)
def test_output_that_nobody_can_take(redirect: str, codes: set[int], lines: int) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} 01_resnet_beginner.py {redirect}"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode in codes, done.stderr
    assert len(done.stderr.splitlines()) == lines, done.stderr
    assert not lines or "No space left on device" in done.stderr


def test_a_run_with_workers_ends_in_silence_whatever_the_classes_are_called(
    image_folder: Callable, tmp_path: Path
) -> None:
    """Workers that Python has to end at its exit delay it and leave a traceback behind. And names
    on a terminal that knows ASCII only, in figures that have no glyphs for them.
    """
    folder = image_folder(classes=("猫", "собака", "été"), size=80)
    done = python(
        "01_resnet_beginner.py", "--dataset", "folder", "--data-dir", str(folder), "--smoke",
        "--image-size", "72", "--model", "resnet20", "--batch-size", "8", "--workers", "2",
        "--device", "cpu", "--run-dir", str(tmp_path / "runs"),
        LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "tool", "bundle grade index kit notebook slides starter tests.bench".split()
)
def test_a_flag_that_a_tool_does_not_know_is_one_line(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = importlib.import_module(tool if "." in tool else f"common.{tool}")
    flags = {"kit": ["gradescope", "--lessons", "01"], "starter": ["01", "--out", "x"]}
    argv = [*flags.get(tool, ["input"]), "--nonsense"]
    monkeypatch.setattr(sys, "argv", [tool, *argv])
    with pytest.raises(SystemExit) as stopped:
        module.main(*[argv] * (tool != "tests.bench"))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --nonsense (see --help)\n"


@pytest.mark.parametrize(
    "flags",
    "nonsense|input --rounds 0|input --model resnet81|accuracy --sides resnet18@0".split("|"),
)
def test_a_benchmark_that_there_is_not_ends_before_it_begins(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *flags.split()])
    with pytest.raises((SystemExit, UserError)):
        importlib.import_module("tests.bench").main()
    assert not capsys.readouterr().out


def test_help_is_in_groups_the_lessons_own_first(cli: Callable) -> None:
    code, out, _ = cli("06", "--help")
    titles = [line for line in out.splitlines() if re.fullmatch(r"\w[\w ]*:", line)]
    assert code == 0 and "usage" not in out
    assert titles == ["this lesson:", "images:", "training:", "machine:", "the run and its folder:"]
    assert out.index("--growth-rate") < out.index("images:") < out.index("--dataset")


def test_depth_is_not_taken_for_that_of_a_network(cli: Callable) -> None:
    code, _, err = cli("06", "--depth", "40")
    assert code == 2 and "--summary" in err


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_summary_fits_a_terminal_and_adds_up(
    cli: Callable, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.inspection.thop_macs", lambda *parts: 0)  # a line of its own
    flags = "--model densenet121 --image-size 224 --dataset cifar10 --summary".split()
    name = "--depth" if depth == 1 else "--summary-depth"  # the older one
    code, out, err = cli("06", *flags, name, str(depth))
    assert code == 0, err
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    start = next(i for i, line in enumerate(lines) if line.startswith("layer ")) + 1
    end = next(i for i, line in enumerate(lines) if line.startswith("total "))
    numbers = [
        [int(n.replace(",", "")) for n in line.split()[-2:]] for line in lines[start : end + 1]
    ]
    *rows, total = numbers
    assert [sum(column) for column in zip(*rows)] == total
    assert min(macs for _, macs in rows) >= 0
    assert len(rows) == 3 if depth == 1 else len(rows) > 10
