"""Two processes are one: the same losses, the same
weights, the same counts, over gloo on the CPU.
"""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from tests.warm import Warm

ROOT = Path(__file__).resolve().parent.parent

# No BatchNorm: each process has its own batch, and gloo no SyncBatchNorm.
SCRIPT = """
import dataclasses, functools, json, sys
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from common.engine import processes
from common.config import TrainConfig
from common.data import load_data
from common.evaluation import evaluate
from common.runs import Run, prepare
from common.evaluation import score
from common.training import fit, make_optimizer, make_schedule

torch.set_num_threads(1)
batch, out, augment = int(sys.argv[1]), sys.argv[2], sys.argv[3]
config = TrainConfig(
    model="net", dataset="digits", epochs=2, batch_size=batch, device="cpu", augment=augment,
    run_dir=out,
)
config, device = prepare(config)
data = load_data(config, device)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
optimizer = make_optimizer(model, config)
schedule = make_schedule(optimizer, config, data.train)
run = Run.open(config, "ddp")
losses = []
loss_fn = nn.CrossEntropyLoss()
history = fit(model, data, loss_fn, optimizer, schedule, config, run, on_step=losses.append)
losses = torch.stack(losses)
losses = processes.sum_over_processes(losses) / processes.world_size()
test = evaluate(model, data.test, data.class_names)
loss, top1 = score(model, data.test)
if processes.is_main():
    torch.save(model.state_dict(), out + "/weights.pt")
    records = [dataclasses.asdict(r) for r in history]
    outcome = {
        "losses": losses.tolist(), "history": records, "support": [c.support for c in
        test.per_class], "top1": test.top1, "score": [loss, top1], "targets": test.targets.tolist(),
        "probabilities": test.probabilities.tolist(), "lr": config.lr,
    }
    json.dump(outcome, open(out + "/outcome.json", "w"))

# Each process has BatchNorm statistics of its own images; what is validated is the same in all.
import common.training
seen = []
def noted(model, loader):
    seen.append([b.clone() for b in model.buffers()])
    return score(model, loader)
common.training.score = noted
for ema in (0.0, 0.5):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    short = dataclasses.replace(config, epochs=1, smoke=True, ema=ema)
    optimizer = make_optimizer(net, short)
    fit(net, data, loss_fn, optimizer, make_schedule(optimizer, short, data.train), short)
    there = processes.from_all(seen.pop())
    for one in there:
        assert all(map(torch.equal, one, there[0])), "another model was validated"

# The batches of one step exchange their gradients once, compiled or not.
exchanges, steps, parallel = [], [], processes.parallel
def counted(state, bucket):
    exchanges.append(bucket.index())
    return allreduce_hook(state, bucket)
def hooked(*arguments):
    wrapped = parallel(*arguments)
    wrapped.register_comm_hook(None, counted)
    return wrapped
if processes.world_size() > 1:
    processes.parallel, torch.compile = hooked, functools.partial(torch.compile, backend="eager")
    several = dataclasses.replace(config, epochs=1, accumulate=3, compile=True)
    optimizer, data = make_optimizer(model, several), load_data(several, device)
    rest = optimizer, make_schedule(optimizer, several, data.train), several
    fit(model, data, loss_fn, *rest, on_step=steps.append)
    assert len(exchanges) == len(steps) < data.train.images_per_epoch / 64 / 2, exchanges
processes.leave_processes()
"""


def family(folder: Path, number: int, *argv: str, of: int = 2, **environment: str) -> list[Warm]:
    """`number` processes of a run `of` so many, with what torchrun would tell each."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": str(of), "LOCAL_WORLD_SIZE": str(of), "MASTER_ADDR": "127.0.0.1"}
    told |= {"MASTER_PORT": str(port), **environment}
    return [
        Warm(folder, *argv, RANK=str(rank), LOCAL_RANK=str(rank), **told) for rank in range(number)
    ]


def train(folder: Path, processes: int, batch: int, augment: str = "basic") -> dict:
    argv = ["-c", SCRIPT, str(batch), str(folder), augment]
    ended = [one.join() for one in family(folder, processes, *argv, of=processes)]
    assert not any(code for code, _, _ in ended), ended
    outcome = json.loads((folder / "outcome.json").read_text())
    said = "".join(out for _, out, _ in ended)
    return {**outcome, "weights": torch.load(folder / "weights.pt"), "out": said}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_processes_train_and_count_like_one(tmp_path: Path) -> None:
    one = train(tmp_path / "one", 1, 64)
    two = train(tmp_path / "two", 2, 32)
    assert one["lr"] == two["lr"], "the learning rate follows the global batch"
    assert len(one["losses"]) == len(two["losses"]) >= 40
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-5)
    for name, tensor in one["weights"].items():
        assert torch.allclose(tensor, two["weights"][name], atol=1e-5), name
    # 359 test images over two processes: one has 180, the other 179; each counts once, in order.
    assert sum(two["support"]) == 359 and one["support"] == two["support"]
    assert one["targets"] == two["targets"]
    difference = torch.tensor(one["probabilities"]) - torch.tensor(two["probabilities"])
    assert difference.abs().max() < 1e-4
    assert one["top1"] == two["top1"] and two["score"][1] == pytest.approx(two["top1"])
    for a, b in zip(one["history"], two["history"]):
        assert a["train_top1"] == b["train_top1"] and a["val_top1"] == b["val_top1"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    assert two["out"].count("epoch 1/2") == 1, "one process speaks"


# ---------------------------------------------------------------- what goes wrong in one of several

FAULTY = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
from torch import nn
from common.cli import main
from common.config import TrainConfig
from common.data import make_data
from common.engine import processes, signals
from common.engine.errors import UserError
from common.engine.sources import Pictures, Source
from common.runs import Run, prepare
from common.training import fit, make_optimizer, make_schedule

torch.set_num_threads(1)

fault, folder = sys.argv[1:]
again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

def on_step(loss):
    step = schedule.taken
    if step == 25 and not again and processes.rank() == 1:
        if fault == "error":
            raise UserError("the disk of process 1 is gone")
        if fault == "bug":
            raise KeyError("a bug")
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    if step == 25 and not again and processes.rank() == 0 and fault == "first killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "slow" and step == 12:
        print("step 12", flush=True)
        while not signals._came:  # however late this process's parent reads the line
            time.sleep(0.02)

def run(config):
    global schedule
    config, device = prepare(config)
    labels, pixels = torch.arange(1000) % 10, torch.arange(192000) % 251  # no import of sklearn
    noise = Pictures(labels, pixels.to(torch.uint8).view(1000, 3, 8, 8))
    source = Source("noise", [*"abcdefghij"], noise, noise.take(labels[:100]))
    data = make_data(source, config, device)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10))
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, data.train)
    run = Run.open(config, "ddp")
    fit(model, data, nn.CrossEntropyLoss(), optimizer, schedule, config, run, on_step=on_step)
    print(f"done {{processes.rank()}} {{again}}\\n", end="", flush=True)  # at once: two speak

config = TrainConfig(
    model="net", dataset="digits", epochs=2, batch_size=32, device="cpu", run_dir=folder,
    save_every=0.0,
)
main(config, {{"net": None}}, None, run, {{}})
"""


def faulty(folder: Path) -> Path:
    script = folder / "faulty.py"
    script.write_text(FAULTY.format(root=str(ROOT)))
    return script


def under_torchrun(folder: Path, fault: str, *flags: str) -> Warm:
    """torchrun itself begins with torch imported; what it starts are processes as they come."""
    run = ["-c", "from torch.distributed.run import main; main()", *flags]
    two = "--nproc-per-node=2", "--standalone"
    return Warm(folder, *run, *two, str(faulty(folder)), fault, str(folder))


FAULTS = {
    "error": ([2, 2], "error: the disk of process 1 is gone"),
    "killed": ([2, -signal.SIGKILL], "error: another process of this run died"),
    "first killed": ([-signal.SIGKILL, 2], "error: the first process of this run died"),
    "bug": ([1, 1], "KeyError: 'a bug'"),
    "alone": ([2], "processes of this run did not find each other within 3 s"),
}


def test_a_fault_in_one_process_ends_all_with_one_line(tmp_path: Path) -> None:
    """Five runs at once, each of two processes that find each other; of "alone" one never comes."""
    runs, script = {}, faulty(tmp_path)
    for fault, (codes, _) in FAULTS.items():
        folder, patience = tmp_path / fault, "3" if fault == "alone" else "60"
        argv = [script, fault, str(folder)]
        runs[fault] = family(folder, len(codes), *argv, JOIN_SECONDS=patience)
    for fault, (codes, message) in FAULTS.items():
        ended = [one.join() for one in runs[fault]]
        err = "".join(said for _, _, said in ended)
        assert [code for code, _, _ in ended] == codes, err
        assert message in err
        if fault != "bug":
            assert len(err.splitlines()) == 1, err
        assert err.count("Traceback") == (fault == "bug")
        if "killed" in fault:
            assert "--resume" in err


def test_torchrun_starts_again_where_the_run_was(tmp_path: Path) -> None:
    """--max-restarts=1 after a killed worker: the second round resumes, in the same folder.

    It hung as long as the new workers found the addresses of the old ones in torchrun's store.
    """
    code, out, err = under_torchrun(tmp_path, "killed", "--max-restarts=1").join()
    assert code == 0, err
    assert "resume     after" in out and "done 0 1" in out and "done 1 1" in out
    assert len(list((tmp_path / "ddp").iterdir())) == 1


def test_a_signal_under_torchrun_is_one_farewell_that_goes_on(tmp_path: Path) -> None:
    started = under_torchrun(tmp_path, "slow")
    while "step 12" not in started.out.read_text() and started.process.is_alive():
        time.sleep(0.01)
    started.kill(signal.SIGTERM)
    err = started.join()[2]
    told = [line for line in err.splitlines() if "Go on with" in line]
    assert len(told) == 1 and " --standalone --nproc-per-node=2 " in told[0], err
    (run,) = (tmp_path / "ddp").iterdir()
    assert told[0].endswith(f"--resume {run}") and (run / "last.pt").exists()
