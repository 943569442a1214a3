"""The processes of one run: who they are, what they tell each other."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.engine.errors import UserError
from common.engine.signals import on_leave


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def join_processes(device_name: str) -> None:
    """Join the group that torchrun started; nothing where
    it did not. NCCL between GPUs, gloo between CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    cuda = device_name.startswith("cuda") or (device_name == "auto" and torch.cuda.is_available())
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        )
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))


@on_leave
def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Until every process is here."""
    if world_size() > 1:
        dist.barrier()


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The tensor summed over all processes, in place; unchanged where there is one."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest_of_all(*numbers: int) -> list[int]:
    """Each number at its largest over all processes, so that they decide alike."""
    if world_size() == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def from_all(value: Any) -> list[Any]:
    """What each process holds, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def share_buffers(*models: nn.Module) -> None:
    """The main process's BatchNorm statistics in every process, as they are saved and tested."""
    if world_size() > 1:
        for model in models:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def from_main(value: Any) -> Any:
    """What the main process holds, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_rows(mine: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """Tensors whose rows were dealt out one by one (process r holds r, r + W, ...), in order again.

    Args:
        mine: on the CPU; None where a process got no row.
    """
    parts = [part for part in from_all(mine) if part is not None]
    return tuple(_interleaved(tensors) for tensors in zip(*parts))


def _interleaved(parts: tuple[Tensor, ...]) -> Tensor:
    whole = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
    for r, part in enumerate(parts):
        whole[r :: len(parts)] = part
    return whole


def parallel(model: nn.Module, device: torch.device, sync_bn: bool = False) -> nn.Module:
    """DistributedDataParallel around `model` where
    there are several processes; else the model itself.
    """
    if world_size() == 1:
        return model
    if sync_bn and device.type != "cuda":
        raise UserError("--sync-bn: torch has SyncBatchNorm on GPUs only")
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def gradient_sync(model: nn.Module, last: bool) -> AbstractContextManager:
    """Between the batches of one optimizer step only the last has to exchange gradients."""
    if last or not isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
