"""Nothing is lost: a run that is stopped anywhere and resumed is, bit by bit, one that was not."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common.engine import checkpoint
from common.engine.errors import UserError
from tests.warm import Warm

ROOT = Path(__file__).resolve().parent.parent

# A lesson's loop on a tiny net.
SCRIPT = """
import os, sys, time
from dataclasses import dataclass
import torch
from torch import nn
from common.cli import main, parse_flags
from common.config import TrainConfig, knob
from common.data import load_data
from common.runs import Run, prepare
from common.training import fit, make_optimizer, make_schedule

torch.set_num_threads(1)

@dataclass(frozen=True)
class Config(TrainConfig):
    model: str = knob("tiny", "the one there is")

class Tiny(nn.Module):
    def __init__(self, side, nap):
        super().__init__()
        self.nap, self.steps = nap, 0
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(4 * (side - 2) ** 2, 10)
    def forward(self, x):
        self.steps += self.training
        print("batch", self.steps, "of this process", flush=True)
        time.sleep(self.nap)
        return self.head(self.body(x).flatten(1))

def run(config, nap):
    config, device = prepare(config)
    data = load_data(config, device)
    model = Tiny(config.image_size, nap)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, data.train)
    run = Run.open(config, "tiny")
    print("folder", run.folder, flush=True)
    fit(model, data, nn.CrossEntropyLoss(), optimizer, schedule, config, run)

sys.argv[0] = "tiny.py"
nap = float(os.environ["NAP"])
main(parse_flags(Config), {"tiny": Tiny}, None, lambda config: run(config, nap), {})
"""


@dataclass
class Nursery:
    """Starts such runs; `folder` is for what they print."""

    folder: Path

    def start(self, *argv: str, nap: float = 0.0) -> Warm:
        return Warm(self.folder, "-c", SCRIPT, *argv, NAP=str(nap))

    def finish(self, *argv: str) -> tuple[int, str, str]:
        return self.start(*argv).join()


FLAGS = [
    "--image-size", "8", "--epochs", "3", "--batch-size", "64", "--ema", "0.9",
    "--augment", "strong", "--save-every", "0", "--schedule", "plateau",
]  # fmt: skip


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Nursery:
    return Nursery(tmp_path_factory.mktemp("nursery"))


def the_run(folder: Path) -> Path:
    (only,) = (folder / "tiny").iterdir()
    return only


def outcome(folder: Path) -> dict:
    """Everything that a finished run holds, apart from the time that it took."""
    run = the_run(folder)
    state = checkpoint.load(run / "last.pt")
    for record in state["history"]:
        record.pop("seconds"), record.pop("images_per_second")
    for key in ("config", "meter"):
        state.pop(key)
    return {"last": state, "best": checkpoint.load(run / "best.pt")["model"]}


def assert_same(a: object, b: object, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def whole(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    code, _, err = nursery.finish("--dataset", "digits", *FLAGS, "--run-dir", str(folder))
    assert code == 0, err
    return outcome(folder)


def test_killed_at_twenty_random_moments(nursery: Nursery, tmp_path: Path, whole: dict) -> None:
    """SIGKILL, over and over, at moments nobody chose; a save after every step, so that many hit
    one. Where a machine is so fast that a run ends before twenty kills, another is begun.
    """
    dice, kills = random.Random(0), 0
    for attempt in itertools.count():
        folder = tmp_path / str(attempt)
        flags, code = ["--dataset", "digits", *FLAGS, "--run-dir", str(folder)], -signal.SIGKILL
        while code == -signal.SIGKILL:
            child = nursery.start(*flags, nap=0.002)
            child.wait_for("folder")
            if kills < 25:
                time.sleep(dice.uniform(0.0, 0.08))
                child.kill(signal.SIGKILL)
            code, _, err = child.join()
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL) and err == "", err
            flags = ["--resume", str(the_run(folder))]
        assert_same(outcome(folder), whole, "resumed")
        if kills >= 20:
            break


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(
    nursery: Nursery, tmp_path: Path, whole: dict, number: int, code: int
) -> None:
    flags = ["--dataset", "digits", *FLAGS, "--run-dir", str(tmp_path)]
    flags[flags.index("--save-every") + 1] = "1000"
    child = nursery.start(*flags, nap=0.05)
    child.wait_for("batch 5 ")
    child.kill(number)
    returned, _, err = child.join()
    assert returned == code, err
    assert f"--resume {the_run(tmp_path)}" in err and "Traceback" not in err
    state = checkpoint.load(the_run(tmp_path) / "last.pt")
    assert state["meter"]["batch"] > 0, "stopped within an epoch"
    returned, out, err = nursery.finish("--resume", str(the_run(tmp_path)))
    assert returned == 0, err
    assert "resume     after" in out
    assert_same(outcome(tmp_path), whole, "resumed")


def test_a_second_signal_exits_at_once(nursery: Nursery, tmp_path: Path) -> None:
    """In the middle of a step that takes longer than this test may."""
    child = nursery.start("--dataset", "digits", *FLAGS, "--run-dir", str(tmp_path), nap=3600)
    child.wait_for("batch 1 ")
    for _ in range(100):  # two that a busy machine brings together are heard as one
        if child.process.is_alive():
            child.kill(signal.SIGINT)
            child.process.join(0.2)
    code, out, err = child.join()
    assert code == 130 and "batch 2 " not in out and "Traceback" not in err, err


def test_files_and_workers_resume_within_an_epoch(
    nursery: Nursery, tmp_path: Path, image_folder: Callable
) -> None:
    """The same through a DataLoader, stopped with two workers and resumed with none."""
    folder = image_folder(per_class=20, size=80, classes=tuple("abcdefghij"))
    flags = [
        "--dataset", "folder", "--data-dir", str(folder), "--image-size", "72", "--epochs", "2",
        "--batch-size", "10", "--augment", "strong", "--lr", "0.01",
    ]  # fmt: skip
    whole = tmp_path / "whole"
    code, _, err = nursery.finish(*flags, "--workers", "0", "--run-dir", str(whole))
    assert code == 0, err
    stopped = tmp_path / "stopped"
    child = nursery.start(*flags, "--workers", "2", "--run-dir", str(stopped), nap=0.1)
    child.wait_for("batch 5 ")
    child.kill(signal.SIGTERM)
    code, _, err = child.join()
    assert code == 143, err
    resume = str(the_run(stopped))
    assert checkpoint.load(Path(resume) / "last.pt")["meter"]["batch"] > 0
    code, _, err = nursery.finish("--resume", resume, "--workers", "0")
    assert code == 0, err
    assert_same(outcome(stopped), outcome(whole), "resumed")


# SWEEP=0.05 pytest -s tests/test_resume.py -k any_instant: a signal every 50 ms, and the counts.
EVERY = float(os.environ.get("SWEEP", 0))
# Without it: soon, in the training and after it, however slow the machine is.
SAMPLE = [(0.1, signal.SIGINT), ("epoch 1/2", signal.SIGTERM), ("epoch 2/2", signal.SIGHUP)]


@pytest.mark.timeout(3600 if EVERY else 240)
def test_a_signal_at_any_instant_is_one_true_line(tmp_path: Path) -> None:
    """From the imports to the report: the exit code, one line, and a command that does go on."""
    heard = {n for _, n in SAMPLE if signal.getsignal(n) != signal.SIG_IGN}  # under nohup: not all
    every = zip(itertools.count(0.05, EVERY), itertools.cycle(sorted(heard)))
    moments = every if EVERY else [moment for moment in SAMPLE if moment[1] in heard]
    ended, told, again, env = 0, [], 0, {**os.environ, "OMP_NUM_THREADS": "1"}
    for after, number in moments:
        with subprocess.Popen(
            [sys.executable, "01_resnet_beginner.py", "--dataset", "digits", "--model", "resnet20",
             "--epochs", "2", "--device", "cpu", "--run-dir", f"{tmp_path}/the runs/{len(told)}"],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=env,
        ) as process:  # fmt: skip
            if isinstance(after, str):
                next(line for line in process.stdout if line.startswith(after))
            else:
                time.sleep(after)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        early = isinstance(after, float) and after < 0.5
        if process.returncode == -number and not err and not out and early:
            continue  # before Python had read the first line
        if process.returncode in (0, -number) and "report " in out and not err:
            ended += 1  # after the last line
            if ended == 5 or not EVERY:
                break
            continue
        assert process.returncode == 128 + number, (after, number, err)
        assert len(err.splitlines()) == 1 and err.startswith("stopped"), (after, number, err)
        told.append(err)
        if "Go on with: " in err and (not EVERY or len(told) % 5 == 0):
            line, kept = err.split("Go on with: ")[1], {"capture_output": True, "text": True}
            went_on = subprocess.run(line, shell=True, cwd=ROOT, env=env, **kept)
            assert went_on.returncode == 0 and "report " in went_on.stdout, (after, went_on.stderr)
            again += 1
    commands = sum("Go on" in line for line in told)
    print(f"\n{len(told)} signals, each one line and its exit code; {commands} gave a command, of "
          f"which {again} were run and went on")  # fmt: skip
    assert told and (EVERY or commands == again == sum(isinstance(a, str) for a, _ in moments))


# --------------------------------------------------------------------------------- checkpoint files


def test_checkpoint_round_trip_and_previous(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for i in range(3):
        checkpoint.save(path, {"i": i, "x": torch.full((4,), float(i))}, keep_previous=True)
    assert checkpoint.load(path)["i"] == 2
    assert checkpoint.load(checkpoint.previous(path))["i"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damage_is_seen_and_the_one_before_is_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "last.pt"
    for i in range(2):
        checkpoint.save(path, {"i": i, "x": torch.ones(1000)}, keep_previous=True)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = bytearray()
    else:  # one bit of the tensor, which torch itself would load without a word
        with zipfile.ZipFile(path) as archive:
            info = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
        data[info.header_offset + 200] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"last\.pt is"):
        checkpoint.load(path)
    assert checkpoint.load_latest(path)["i"] == 0
    assert "going on from previous.pt" in capsys.readouterr().out


def test_any_bit_that_flips_is_one_line_or_no_harm(tmp_path: Path) -> None:
    """In what frames a file, which no checksum covers: zipfile has errors of many kinds."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"i": 1})
    data = path.read_bytes()
    directory = data.index(b"PK\x01\x02")
    refused = 0
    for place in [*range(60), *range(directory, len(data))]:
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        try:
            assert checkpoint.load(path)["i"] == 1
        except UserError:
            refused += 1
    assert refused > 100


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"format": 1, "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not loaded"):
        checkpoint.load(tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="truncated or no checkpoint"):
        checkpoint.load(tmp_path / "raw.pt")
    assert not (tmp_path / "pwned").exists()


def test_another_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format": 99}, tmp_path / "new.pt")
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(tmp_path / "new.pt")


def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"i": 0})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left.*previous checkpoint is untouched"):
        checkpoint.save(path, {"i": 1})
    monkeypatch.undo()
    assert checkpoint.load(path)["i"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a Linux device")
def test_a_disk_that_fills_while_torch_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"i": 0})
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", **k: real(Path("/dev/full"), mode, **k)
    )
    with pytest.raises(UserError, match="can't be written"):
        checkpoint.save(path, {"x": torch.ones(100_000)})
    monkeypatch.undo()
    assert checkpoint.load(path)["i"] == 0


def test_resume_refuses_what_does_not_belong(nursery: Nursery, tmp_path: Path) -> None:
    code, _, err = nursery.finish(
        "--dataset", "digits", *FLAGS, "--run-dir", str(tmp_path), "--smoke"
    )
    assert code == 0, err
    run = the_run(tmp_path)
    cases = {
        ("--resume", str(tmp_path / "nowhere")): "no such run folder",
        ("--resume", str(run), "--lr", "0.5"): "--lr 0.5: the run in",
        ("--resume", str(run / "best.pt")): "weights only",
        ("--resume", str(tmp_path)): "no config.json",
    }
    for flags, message in cases.items():
        code, _, err = nursery.finish(*flags)
        assert code == 2 and message in err, (flags, err)
        assert len(err.strip().splitlines()) == 1, err
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "seed": 9}))
    code, _, err = nursery.finish("--resume", str(run))
    assert code == 2 and "was made with seed 0, not 9" in err


@pytest.fixture(scope="module")
def finished(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    code, _, err = nursery.finish(
        "--dataset", "digits", *FLAGS, "--run-dir", str(folder), "--smoke"
    )
    assert code == 0, err
    return the_run(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "holds no settings"), ("null", "holds no settings"), ("{", "can't be read"),
     ({"epochs": "many"}, "--epochs 'many': wants int"), ({"epochs": 1.5}, "wants int"),
     ({"lr": "0.1"}, "wants float"), ({"amp": 1}, "wants bool"), ({"seed": True}, "wants int"),
     ({"model": None}, "wants str"), ({"depth": 3}, "made by another version"),
     ({"ema": 2}, "the most that makes sense")],
)  # fmt: skip
def test_a_config_that_is_none_is_one_line(
    nursery: Nursery, tmp_path: Path, finished: Path, content: object, message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    if isinstance(content, dict):
        content = json.dumps(json.loads((run / "config.json").read_text()) | content)
    (run / "config.json").write_text(content)
    code, _, err = nursery.finish("--resume", str(run))
    assert code == 2 and message in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    ("change", "message"),
    [({"history": ...}, "has no history"), ({"meter": ...}, "has no meter"),
     ({"world": "2"}, "world is of type str"), ({"history": [3]}, "history is of type int"),
     ({"meter": {"epoch": 1}}, "has no meter.batch"), ({"best": None}, "best is of type NoneType"),
     ({"model": {"body.0.weight": torch.ones(2)}}, "doesn't fit this run"),
     ({"optimizer": {"state": {}}}, "doesn't fit this run"), ({"rng": [{}]}, "doesn't fit")],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_one_line(
    nursery: Nursery, tmp_path: Path, finished: Path, change: dict, message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    state = checkpoint.load(run / "last.pt") | change
    (run / "previous.pt").unlink(missing_ok=True)
    checkpoint.save(run / "last.pt", {k: v for k, v in state.items() if v is not ...})
    code, _, err = nursery.finish("--resume", str(run))
    assert code == 2 and message in err and len(err.splitlines()) == 1, err


def test_what_a_killed_run_left_half_written_is_removed(
    nursery: Nursery, tmp_path: Path, finished: Path
) -> None:
    for name in ("run", "neighbour"):
        shutil.copytree(finished, tmp_path / name)
        (tmp_path / name / ".last.pt.12345.tmp").write_bytes(b"half")
    code, _, err = nursery.finish("--resume", str(tmp_path / "run"))
    assert code == 0, err
    assert [p.name for p in tmp_path.glob("*/.*.tmp")] == []


def test_two_at_once_in_one_folder(nursery: Nursery, tmp_path: Path, finished: Path) -> None:
    """The second is told; the files of one that is at work are left alone."""
    shutil.copytree(finished, tmp_path / "tiny" / "run")
    busy = tmp_path / "tiny" / "run"
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from common.engine.files import claim_folder
claim_folder(Path({str(busy)!r}))
print("claimed", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        (busy / ".last.pt.1.tmp").write_bytes(b"half")
        code, _, err = nursery.finish("--resume", str(busy))
        assert code == 2 and "another process is working in this folder" in err
        assert len(err.splitlines()) == 1
        flags = ["--dataset", "digits", *FLAGS, "--run-dir", str(tmp_path), "--smoke"]
        assert nursery.finish(*flags)[0] == 0
        assert (busy / ".last.pt.1.tmp").exists()
        other.kill()
    code, _, err = nursery.finish("--resume", str(busy))
    assert code == 0, err


def test_a_signal_in_the_last_save_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable
) -> None:
    """The run is done but for the save; it leaves by the signal, with all on the disk."""
    real, flags = os.fsync, "--dataset digits --model resnet20 --device cpu --smoke".split()
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        saves = []

        def fsync(handle: int, number: int = number, saves: list = saves) -> None:
            saves.append(handle)
            # config.json, the first save, best.pt, history.csv: each and its folder
            if len(saves) == 9:  # the last save
                os.kill(os.getpid(), number)
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        before = signal.signal(number, signal.SIG_DFL)  # nohup, for one, has it ignored
        returned, out, err = cli("01", *flags, "--run-dir", str(tmp_path / str(code)))
        signal.signal(number, before)
        assert returned == code and len(err.splitlines()) == 1, err
        assert len(saves) == 10 and "--resume" in err and "test  " not in out
        (run,) = (tmp_path / str(code) / "01_resnet_beginner").iterdir()
        assert checkpoint.load(run / "last.pt")["meter"]["epoch"] == 1
