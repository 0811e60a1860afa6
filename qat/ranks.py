"""The processes of one job: who is who, and the few messages they exchange outside training.

Every function here that talks is collective: all processes call it, in the same order. A job of one process needs no
process group, and every function then answers at once. Messages go over gloo on the CPU, beside NCCL.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_control: list[Any] = []


def rank() -> int:
    """Number of this process in the job, 0 speaks for it."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Processes of the job, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def connect(accelerator: str, timeout_minutes: float) -> None:
    """Join the job's process group; Lightning finds it and uses it. Nothing in a job of one process."""
    if world() == 1:
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if accelerator == "gpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if accelerator == "gpu" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))


def disconnect() -> None:
    """Leave the process group, all together: from here on a process is alone."""
    if is_connected():
        import torch.distributed as dist

        dist.barrier(_group())
        _control.clear()
        dist.destroy_process_group()


def is_connected() -> bool:
    """Whether there are other processes to talk to."""
    if "torch.distributed" not in sys.modules:  # a process that has not met torch has met nobody
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def largest(value: int) -> int:
    """The largest `value` of all processes."""
    if not is_connected():
        return value
    import torch
    import torch.distributed as dist

    there = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(there, dist.ReduceOp.MAX, group=_group())
    return int(there)


def reduced(tensor: Tensor, how: str) -> Tensor:
    """min, max, sum or mean over all processes of a tensor of one shape, on its own device; gradients do not flow."""
    if not is_connected():
        return tensor
    import torch.distributed as dist

    ops = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM}
    there = tensor.detach().clone()
    dist.all_reduce(there, ops[how])
    return there / dist.get_world_size() if how == "mean" else there


def gather(value: Any) -> list[Any]:
    """Every process's `value`, in order of rank, on every process. Plain Python data only."""
    if not is_connected():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_group())
    return values


def from_main(value: Any) -> Any:
    """The `value` of rank 0, on every process. Plain Python data only."""
    return gather(value)[0]


def _group() -> Any:
    """A gloo group of all processes: the default one, or one beside NCCL."""
    import torch.distributed as dist

    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    if not _control:
        _control.append(dist.new_group(backend="gloo"))
    return _control[0]
