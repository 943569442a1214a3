"""What stops a bad step: the gradient's limit, and numbers that are no longer finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.engine.errors import Diverged
from common.engine.meter import Lagging


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
