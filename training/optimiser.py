"""What both stages update with: parameter groups, schedule, gradients over ranks, and refusal of what is not finite."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.config import OptimParams
from utils import distributed
from utils.errors import DiffoError


class NotFinite(DiffoError):
    """A loss that is NaN or infinite; nothing was updated with it."""


def parallel(network: nn.Module) -> nn.Module:
    """DDP over a network whose trainable parameters all take part in every step; itself when unlaunched."""
    if distributed.world_size() == 1:
        return network
    return DistributedDataParallel(network, forward_sync_buffers=False)


class Optimiser:
    """AdamW with its learning-rate schedule, a function of the step alone.

    Quantiles (CompressAI's auxiliary loss) are a group of their own: constant learning rate, no decay, no clipping,
    and they stay out of the gradient's norm.
    """

    QUANTILE_LR = 1e-3

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], params: OptimParams, iterations: int, fused: bool = False
    ):
        named = [(name, p) for name, p in parameters if p.requires_grad]
        self.parameters = [p for name, p in named if not name.endswith(".quantiles")]
        quantiles = [p for name, p in named if name.endswith(".quantiles")]
        self.params, self.iterations = params, iterations
        kernel = {"fused": True} if fused else {}  # False would also turn off what PyTorch chooses itself
        self.adamw = torch.optim.AdamW(
            self.parameters, params.lr, params.betas, weight_decay=params.weight_decay, **kernel
        )
        if quantiles:
            self.adamw.add_param_group({"params": quantiles, "lr": self.QUANTILE_LR, "weight_decay": 0.0})

    def lr(self, step: int) -> float:
        p = self.params
        if step < p.warmup:
            return p.lr * (step + 1) / p.warmup
        progress = (step - p.warmup) / max(1, self.iterations - p.warmup)
        end = p.lr if p.lr_end is None else p.lr_end
        return end + (p.lr - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def step(self, loss: Tensor, step: int) -> float:
        """Backward, clip, update; returns the gradient's norm before clipping.

        Raises:
            NotFinite: the gradient is not; it is the same on all ranks, and nothing was updated with it.
        """
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.params.clip or math.inf)
        if not norm.isfinite():
            raise NotFinite(f"step {step}: the gradient is not finite; nothing was updated with it")
        self.adamw.param_groups[0]["lr"] = self.lr(step)
        self.adamw.step()
        return norm.item()


def finite(terms: dict[str, Tensor], stage: str, step: int) -> None:
    """Raise NotFinite naming the first term that is not a number, on every rank alike."""
    values = torch.stack([term.detach().float() for term in terms.values()])
    bad = distributed.all_reduce_sum((~values.isfinite()).float())
    for name, count in zip(terms, bad.tolist(), strict=True):
        if count:
            raise NotFinite(f"stage {stage}, step {step}: the term {name} is not finite; nothing was updated with it")
