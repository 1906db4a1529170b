"""Batches in pieces and over ranks: DDP or what stands for it, micro-batches, sums of their terms."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import distributed


def parallel(network: nn.Module, graphs: bool = False) -> nn.Module:
    """DDP over a network whose trainable parameters all take part in every step; itself when unlaunched.

    Args:
        graphs: its passes are recorded, and DDP's hooks are none to be. It is itself then, with the main process's
            weights, and whoever trains calls `average_gradients` after the passes.
    """
    if distributed.world_size() == 1:
        return network
    if graphs:
        distributed.broadcast([*network.parameters(), *network.buffers()])
        return network
    # With channels_last, kernels of one pixel lie the same way under several strides, and DDP calls them different.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(network, forward_sync_buffers=False)


def settle(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """DDP fixes its bucket order in the first backward pass; run one and discard it, so that a resumed run sums in the
    same order.

    Args:
        loss: of a micro-batch, from a forward pass through `model`; the same at every start.
    """
    if isinstance(model, DistributedDataParallel):
        loss().backward()
        model.zero_grad(set_to_none=True)


def micro_batches(size: int, largest: int | None) -> list[slice]:
    """A batch of `size` samples in pieces of at most `largest`; None leaves it whole."""
    largest = largest or size
    return [slice(start, min(start + largest, size)) for start in range(0, size, largest)]


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager:
    """Around forward and backward: only the last micro-batch of a step sends the gradients to the other ranks."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The mean over all ranks, sent in one piece; of parameters that have a gradient, the same on every rank."""
    distributed.average([parameter.grad for parameter in parameters if parameter.grad is not None])


def accumulate(total: dict[str, Tensor], terms: dict[str, Tensor], share: float) -> None:
    """Add the terms of a micro-batch, weighted by its share of the batch; the gradient is left out."""
    for name, term in terms.items():
        total[name] = total.get(name, 0) + share * term.detach()
