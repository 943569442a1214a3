"""`--track tensorboard`: what history.csv gets goes to TensorBoard's files too, by torch's own
writer.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from common.engine.records import EpochRecord


@cache
def writer(folder: Path) -> SummaryWriter:
    """One file of events for a process and its run."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard")


def track(folder: Path, record: EpochRecord) -> None:
    """An epoch's numbers; see them with `tensorboard --logdir runs`."""
    for name, value in asdict(record).items():
        if name != "epoch":
            writer(folder).add_scalar(name, value, record.epoch)
    writer(folder).flush()
