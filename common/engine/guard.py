"""What a step may run into: a gradient beyond its limit, numbers that are no longer finite, a GPU
whose memory is out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.engine import processes
from common.engine.errors import Diverged, UserError
from common.engine.meter import Lagging
from common.engine.progress import Bar

if TYPE_CHECKING:
    from common.training import Aids


class Guard:
    """Clips the gradient, and refuses a step whose loss or gradient is not finite.

    On the CPU the answer is there at once. On a GPU it is read a few steps later, since waiting for
    it would idle the device; until then a fused optimizer is told to skip its steps. An optimizer
    that isn't fused can't be told, so there the host waits.

    Args:
        clip: largest norm of the gradient; 0 for no limit.
        amp: the reduced precision of the forward pass.
        kept: where the last good state is, in words, or "".
    """

    def __init__(
        self, device: torch.device, clip: float, amp: torch.dtype | None, kept: str = ""
    ) -> None:
        self.clip, self.kept = clip, kept
        # GradScaler meets infinite gradients as a matter of course: it skips the step and halves
        # its scale. A loss that isn't finite it can't mend.
        self.scaled = amp == torch.float16
        self.failed = torch.zeros((), dtype=torch.bool, device=device)
        self.finite = Lagging(device)
        self.where = ""

    def check(self, loss: Tensor, optimizer: Optimizer, epoch: int, step: int) -> None:
        """Before each optimizer step, so that a NaN never reaches the weights.

        Raises:
            Diverged: this step, or one before it on a GPU, is not finite.
        """
        self.epoch, self.lr = epoch, optimizer.param_groups[0]["lr"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parameters = [p for p in parameters if p.grad is not None]
        if self.clip:
            norm = nn.utils.clip_grad_norm_(parameters, self.clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
        number = loss.detach() if self.scaled else loss.detach() + norm
        self.failed |= ~torch.isfinite(number)
        self.finite.push(self.failed.to(torch.float32), at=step)
        if self.finite.asynchronous and not self.scaled:
            if all(group.get("fused") for group in optimizer.param_groups):
                optimizer.grad_scale, optimizer.found_inf = None, self.failed.to(torch.float32)
            else:
                self.finite.take()
        self.refuse()

    def settle(self, val_loss: float) -> None:
        """After each epoch: nothing is chosen, saved or tested with weights that are not finite.

        Raises:
            Diverged: a step was not finite, or the weights after the last one are not.
        """
        self.finite.take()
        if self.failed or not math.isfinite(val_loss):  # what was on its way may be an earlier step
            self.finite.value = 1.0
        self.refuse()

    def refuse(self) -> None:
        if not self.finite.value:
            return
        where = f"epoch {self.epoch}, step {self.finite.at}, learning rate {self.lr:.3g}"
        raise Diverged(
            f"the loss or its gradient is no longer finite ({where}){self.kept}: try --lr "
            f"{self.lr / 10:.2g}, --clip 1 or a longer --warmup"
        )


def with_less_memory(
    train: Callable[[], None], loader: Any, optimizer: Optimizer, aids: Aids, halve: bool, name: str
) -> None:
    """Run `train`, an epoch, under a bar; out of CUDA memory go on with half the images a batch and
    twice as many batches per step.

    Raises:
        UserError: memory is out and batches may not, or can't, be halved.
    """
    meter, scaler = aids.meter, aids.scaler
    while True:
        done = meter.batch * loader.images_per_batch
        try:
            with Bar(loader.images_per_epoch, name, "img", done, show=meter.show) as bar:
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
        flags = f"--batch-size {loader.batch_size} --accumulate {loader.accumulate}"
        print(f"out of memory: going on with {flags}, the same images per step", flush=True)
