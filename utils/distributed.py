"""Rank, world size and the few collectives that training needs; everything works unlaunched, as a world of one."""

import gc
import os
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import DiffoError

# Error texts when another rank has ended.
OTHER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
PATIENCE = timedelta(hours=1)  # for the main process, which alone writes checkpoints


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device):
    """Join the group that torchrun announces (nccl on CUDA, gloo on CPU), and leave it; nothing when unlaunched.

    Raises:
        DiffoError: another process of the group ended while this one waited for it.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if launched:
        # DDP imports it, and what is imported after the group exists keeps the group as a default of its functions: gloo's
        # threads then outlive the interpreter, and one of them once in a hundred runs aborts a process that has finished.
        import torch._dynamo  # noqa: F401

        cuda = device.type == "cuda"
        backend = {"backend": "nccl", "device_id": device} if cuda else {"backend": "gloo"}
        dist.init_process_group(**backend, timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        if launched and any(told in str(error) for told in OTHER_ENDED):
            raise DiffoError("another process of this run has ended, and says why if it could") from error
        raise
    if launched:  # not after an error of this process alone: nccl would wait for the others here
        gc.collect()  # DDP, which cycles keep, holds it too
        dist.destroy_process_group()


def local_device(name: str, option: str = "--device") -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> the device of this process; under torchrun, cuda is the local rank's.

    Args:
        option: what errors call the name.
    Raises:
        DiffoError: another name, or a CUDA device that is not there.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise DiffoError(f"{option} {name}: not one of auto, cpu, cuda, cuda:N")
    if kind == "cuda" and not available:
        raise DiffoError(f"{option} {name}: PyTorch finds no CUDA device here; use cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if index and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise DiffoError(f"{option} {name}: several processes cannot share one device; use cuda")
    number, count = int(index or os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        raise DiffoError(f"{option} {name}: device {number} is asked for, and there are {count}, counted from 0")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over all ranks, in place."""
    return all_reduce_sum(tensor).div_(world_size())


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """The mean over all ranks of each tensor, in place; they travel as one."""
    if world_size() > 1:
        flat = all_reduce_mean(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor]) -> None:
    """The main process's values on every rank, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_samples(batch: Tensor) -> Tensor:
    """The samples (first axis) of all ranks, equally many each, in the order of the stream: sample i of rank r is i*world + r."""
    if world_size() == 1:
        return batch
    batch = batch.contiguous()  # what is received must be laid out as what is sent
    parts = [torch.empty_like(batch) for _ in range(world_size())]
    dist.all_gather(parts, batch)
    return torch.stack(parts, dim=1).flatten(0, 1)


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in order; small picklable ones only."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
