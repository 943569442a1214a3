"""An epoch that goes on with smaller batches when a GPU's memory is out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from common.engine import processes
from common.engine.errors import UserError
from common.engine.meter import Meter
from common.engine.progress import Bar


def with_less_memory(
    train: Callable[[], None],
    loader: Any,
    meter: Meter,
    optimizer: Optimizer,
    halve: bool,
    title: str,
    scaler: torch.amp.GradScaler,
) -> None:
    """Run `train`, an epoch, under a bar; out of CUDA memory go on with half the images a batch and
    twice as many batches per step.

    Raises:
        UserError: memory is out and batches may not, or can't, be halved.
    """
    while True:
        done = meter.batch * loader.images_per_batch
        try:
            with Bar(loader.images_per_epoch, title, "img", done, show=meter.show) as bar:
                meter.begin_epoch(bar)
                return train()
        except torch.OutOfMemoryError as error:
            if not halve or processes.world_size() > 1 or loader.batch_size % 2:
                raise UserError(
                    f"out of memory with {loader.batch_size} images a batch: try a smaller "
                    "--batch-size with a larger --accumulate, or a smaller --image-size"
                ) from error
        # Outside the except clause, which would hold on to the failed step's tensors.
        meter.rewind()
        optimizer.zero_grad(set_to_none=True)
        if scaler.is_enabled():  # it may have unscaled the gradients of the step that failed
            scaler.scale(torch.zeros((), device=meter.sums.device))  # has a scale from here on
            scaler.update(scaler.get_scale())
        torch.cuda.empty_cache()
        loader.rebatch(loader.batch_size // 2, 2 * loader.accumulate)
        meter.batch, meter.batch_at_step = 2 * meter.batch, 2 * meter.batch
        print(
            f"out of memory: going on with --batch-size {loader.batch_size} --accumulate "
            f"{loader.accumulate}, the same images per step",
            flush=True,
        )
