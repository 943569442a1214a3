"""The processes of one run: who they are, what they tell each other."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.engine import signals
from common.engine.errors import UserError
from common.engine.signals import on_leave


def _joined() -> bool:
    """Torch for AMD's GPUs on Windows has no `distributed`, nor a function to ask it with."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    return dist.get_world_size() if _joined() else 1


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def join_processes(device_name: str) -> None:
    """Join the group that torchrun started, if it did: NCCL between GPUs, gloo between CPUs.

    Raises:
        UserError: the others don't come.
    """
    global _store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or _joined():
        return
    if not dist.is_available():
        raise UserError(f"torch {torch.__version__} can't join processes: run without torchrun")
    cuda = device_name.startswith("cuda") or (device_name == "auto" and torch.cuda.is_available())
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // sharing))
    patience = timedelta(seconds=float(os.environ.get("JOIN_SECONDS", 120)))
    try:
        store, me, world = next(dist.rendezvous("env://", timeout=patience))
        # torchrun's store outlives its workers: started again, they must not find the addresses of
        # the dead.
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"round {again}", store)
        store.set(f"here/{me}", "")
        store.wait([f"here/{r}" for r in range(world)], patience)
        # The longest that one has to wait for another: rank 0 may be downloading.
        timeout = timedelta(minutes=30)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=me, world_size=world, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} processes of this run did not find each other within "
            f"{patience.seconds} s ({str(error).splitlines()[0][:80]}): look for one that failed "
            "before, or start all of them with torchrun"
        ) from None
    _store = store
    signals.agree_by(_agree)


# ------------------------------------------------------------------------------ ending all together

_store: dist.Store | None = None  # what the processes can tell each other beside tensors
_failed = False
LOST = "closed by peer|connection reset|broken pipe|timed out|gloo|nccl|process group|remote"


def _agree(line: str, code: int, error: BaseException | None) -> NoReturn:
    """End this process with the exit code of the first that failed; only that one says why.

    The others notice by a connection that is gone, in whatever they were doing together.
    """
    global _failed
    _failed = True
    how_to_go_on = signals.leave()
    try:
        with _silent():
            lost = isinstance(error, RuntimeError) and re.search(LOST, str(error), re.IGNORECASE)
            if not code and lost and not _has_ended(seconds=3):
                died = "error: another process of this run died or can't be reached; the others"
                line, code = f"{died} {how_to_go_on}", 2
            code, first = _end(code or 1)
    except RuntimeError:  # with rank 0 their meeting point is gone
        line, code = f"error: the first process of this run died; the others {how_to_go_on}", 2
        first = rank() == 1
    if first and code == 1:
        traceback.print_exception(error)  # what isn't the user's doing
    elif first:
        signals.say(line or how_to_go_on, everywhere=True)
    _linger()
    os._exit(code)


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, torch's C++ has nowhere to print 15 lines for each connection that is gone."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _has_ended(seconds: float) -> bool:
    """Whether another process has said within so many seconds that it fails."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if _store.check(["end"]):
            return True
        time.sleep(0.05)
    return False


def _end(code: int) -> tuple[int, bool]:
    """The exit code that the processes agree upon, and whether this one was the first to say."""
    mine = f"{code} {rank()}"
    agreed = _store.compare_set("end", "", mine).decode()
    return int(agreed.split()[0]), agreed == mine


def _linger() -> None:
    """Rank 0 holds the store: it stays until the others have read why they end."""
    deadline = time.monotonic() + 2
    with suppress(RuntimeError), _silent():
        gone = _store.add("gone", 1)
        while rank() == 0 and gone < world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
            gone = _store.add("gone", 0)


@on_leave
def leave_processes() -> None:
    """When all went well. The others wait for rank 0, which has a report to write."""
    if _failed or not _joined():
        return
    if _store is not None:
        try:
            if is_main():
                _end(0)
            while not _store.check(["end"]):
                time.sleep(0.1)
            code = int(_store.get("end").decode().split()[0])
        except RuntimeError as error:
            _agree("", 0, error)
        _linger()
        if code:
            os._exit(code)
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
    return from_all(value)[0]


def gather_rows(mine: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """Tensors whose rows were dealt out one by one (process r holds r, r + W, ...), in order again.

    Args:
        mine: on the CPU; None where a process got no row.
    """
    parts = [part for part in from_all(mine) if part is not None]
    in_order = []
    for tensors in zip(*parts):
        whole = tensors[0].new_empty((sum(map(len, tensors)), *tensors[0].shape[1:]))
        for r, tensor in enumerate(tensors):
            whole[r :: len(tensors)] = tensor
        in_order.append(whole)
    return tuple(in_order)


def parallel(model: nn.Module, device: torch.device, sync_bn: bool = False) -> nn.Module:
    """DistributedDataParallel around `model`; where there is one process, the model itself."""
    if world_size() == 1:
        return model
    if sync_bn:
        if device.type != "cuda":
            raise UserError("--sync-bn: torch has SyncBatchNorm on GPUs only")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def gradient_sync(model: nn.Module, last: bool) -> AbstractContextManager:
    """Between the batches of one optimizer step only the last has to exchange gradients."""
    if last or not isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
