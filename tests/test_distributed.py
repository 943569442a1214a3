"""Two processes are one: the same losses, the same
weights, the same counts, over gloo on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# No BatchNorm: each process has its own batch, and gloo no SyncBatchNorm.
SCRIPT = """
import dataclasses, json, sys
sys.path.insert(0, {root!r})
import torch
from torch import nn
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
    outcome = {{
        "losses": losses.tolist(), "history": records, "support": [c.support for c in
        test.per_class], "top1": test.top1, "score": [loss, top1], "targets": test.targets.tolist(),
        "probabilities": test.probabilities.tolist(), "lr": config.lr,
    }}
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
processes.leave_processes()
"""


def train(folder: Path, processes: int, batch: int, augment: str = "basic") -> dict:
    folder.mkdir()
    script = folder / "ddp.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    done = subprocess.run(
        [*launch, str(script), str(batch), str(folder), augment],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads((folder / "outcome.json").read_text())
    return {**outcome, "weights": torch.load(folder / "weights.pt"), "out": done.stdout}


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
