"""What both stages update with: micro-batches, gradients over ranks, parameter groups, and refusal of what is not finite."""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.config import OptimParams, StageParams
from utils import distributed
from utils.errors import NotFinite


def parallel(network: nn.Module) -> nn.Module:
    """DDP over a network whose trainable parameters all take part in every step; itself when unlaunched."""
    if distributed.world_size() == 1:
        return network
    # With channels_last, kernels of one pixel lie the same way under several strides, and DDP calls them different.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(network, forward_sync_buffers=False)


def settle(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """A backward pass that is thrown away, on ranks that train together: DDP orders its buckets by the first one.

    Gradients of three ranks and more are summed in another order before than afterwards; settled first, a run that is
    resumed sums as one that was never stopped.

    Args:
        loss: of a micro-batch, from a forward pass through `model`; the same at every start.
    """
    if isinstance(model, DistributedDataParallel):
        loss().backward()
        model.zero_grad(set_to_none=True)


def blank(params: StageParams, like: Tensor) -> Tensor:
    """A micro-batch of grey pictures, for passes whose result nobody wants: N x 3 x S x S, kind and device of `like`."""
    count = micro_batches(params.batch_size, params.microbatch)[0].stop
    return like.new_zeros(count, 3, params.crop_size, params.crop_size)


def micro_batches(size: int, largest: int | None) -> list[slice]:
    """A batch of `size` samples in pieces of at most `largest`; None leaves it whole."""
    largest = largest or size
    return [slice(start, min(start + largest, size)) for start in range(0, size, largest)]


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager:
    """Around forward and backward: only the last micro-batch of a step sends the gradients to the other ranks."""
    return nullcontext() if last or distributed.world_size() == 1 else model.no_sync()


def accumulate(total: dict[str, Tensor], terms: dict[str, Tensor], share: float) -> None:
    """Add the terms of a micro-batch, weighted by its share of the batch; the gradient is left out."""
    for name, term in terms.items():
        total[name] = total.get(name, 0) + share * term.detach()


def averaged(terms: dict[str, Tensor], stage: str, step: int) -> dict[str, float]:
    """Means of scalars over the ranks.

    Raises:
        NotFinite: names the first term that is not a finite number, on every rank alike.
    """
    values = distributed.all_reduce_mean(torch.stack([term.double() for term in terms.values()])).tolist()
    for name, value in zip(terms, values, strict=True):
        if not math.isfinite(value):
            raise NotFinite(f"stage {stage}, step {step}: the term {name} is not finite; nothing was updated with it")
    return dict(zip(terms, values, strict=True))


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

    def state_dict(self) -> dict:
        return self.adamw.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Take moments and counts; options of the groups stay as the configuration has them now."""
        own = self.adamw.state_dict()["param_groups"]
        groups = [ours | {"params": theirs["params"]} for ours, theirs in zip(own, state["param_groups"], strict=True)]
        self.adamw.load_state_dict(state | {"param_groups": groups})
        for parameter, moments in self.adamw.state.items():  # the fused kernel reads them in the weight's own layout
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(parameter).copy_(moments[name])

    def lr(self, step: int) -> float:
        p = self.params
        if step < p.warmup:
            return p.lr * (step + 1) / p.warmup
        progress = (step - p.warmup) / max(1, self.iterations - p.warmup)
        end = p.lr if p.lr_end is None else p.lr_end
        return end + (p.lr - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def clip(self, stage: str, step: int) -> float:
        """Clip the accumulated gradient; returns its norm before.

        Raises:
            NotFinite: it is not finite, which all ranks see alike.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.params.clip or math.inf).item()
        if not math.isfinite(norm):
            raise NotFinite(f"stage {stage}, step {step}: the gradient is not finite; nothing was updated with it")
        return norm

    def update(self, step: int) -> None:
        self.adamw.param_groups[0]["lr"] = self.lr(step)
        self.adamw.step()
