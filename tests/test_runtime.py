"""What the machine decides: the layout in memory, whose it is, what is said of a missing GPU."""

from __future__ import annotations

import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from common.config import TrainConfig
from common.data import load_data
from common.engine.device import memory_format, pick_device
from common.engine.errors import Interrupted, UserError
from common.engine.signals import STOPPING, caught
from common.runs import Run
from common.training import fit, make_optimizer, make_schedule
from tests.conftest import ROOT
from tests.warm import Warm


def test_depthwise_nets_are_channels_last_at_any_size() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
    depthwise = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    assert memory_format(32, plain) is torch.channels_last
    assert memory_format(8, plain) is torch.contiguous_format
    assert memory_format(8, depthwise) is torch.channels_last


COUNT_PAGE_FAULTS = """
import resource, torch
from common.engine.device import keep_freed_memory, memory_format, pick_device

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)  # 64 MB, born and gone
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
obeyed = keep_freed_memory()
print(int(obeyed), given_back, min(faults() for _ in range(20)))  # it takes some to settle
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets glibc's malloc")
def test_freed_memory_is_kept_for_the_next_step(tmp_path: Path) -> None:
    """Counted by the system: every page of a block that comes back from it is a page fault."""
    code, out, err = Warm(tmp_path, "-c", COUNT_PAGE_FAULTS).join()
    assert code == 0, err
    obeyed, given_back, kept = map(int, out.split())
    if not obeyed:
        pytest.skip("malloc is not glibc's")
    # With pages of 4 kB 16,384 for each block; fewer, and never fewer than one, with larger pages.
    assert given_back >= 5 and kept < given_back / 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_points_to_a_section_that_is_there() -> None:
    with pytest.raises(UserError, match="no CUDA GPU") as caught:
        pick_device("cuda")
    (section,) = re.findall(r"'(.+)' in the README", str(caught.value))
    assert f"\n## {section}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_run_off_the_main_thread_works(tmp_path: Path) -> None:
    """Only the main thread may set handlers of signals; a server's worker thread trains without."""
    before = [signal.getsignal(number) for number in STOPPING]
    config = TrainConfig(
        model="net", dataset="digits", epochs=1, smoke=True, device="cpu", run_dir=str(tmp_path)
    ).resolve("digits")

    def train() -> int:
        data = load_data(config, torch.device("cpu"))
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        optimizer = make_optimizer(net, config)
        schedule = make_schedule(optimizer, config, data.train)
        run = Run.open(config, "thread")
        with caught():
            return len(fit(net, data, nn.CrossEntropyLoss(), optimizer, schedule, config, run))

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train).result() == 1
    assert list(tmp_path.glob("thread/*/last.pt"))
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_a_signal_in_a_destructor_is_not_lost_and_tells_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python hands an exception that a destructor raises to a hook, which prints it."""
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)

    class Short:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    reached = False
    with pytest.raises(Interrupted), caught():
        Short()
        reached = True
    assert reached and not printed and sys.unraisablehook == printed.append
