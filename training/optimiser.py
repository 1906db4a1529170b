"""AdamW with its schedule."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from training.stage_config import OptimParams


class Optimiser:
    """AdamW with its learning-rate schedule, a function of the place in the stage alone.

    Quantiles (CompressAI's auxiliary loss) are a group of their own: constant learning rate, no decay, no clipping,
    and they stay out of the gradient's norm.

    Args:
        shares: of the learning rate, by the start of a parameter's name, or several starts; 1 where none fits.
    """

    QUANTILE_LR = 1e-3

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        params: OptimParams,
        iterations: int,
        fused: bool = False,
        shares: Mapping[str | tuple[str, ...], float] | None = None,
    ):
        named = [(name, p) for name, p in parameters if p.requires_grad]
        quantiles = [p for name, p in named if name.endswith(".quantiles")]
        named = [(name, p) for name, p in named if not name.endswith(".quantiles")]
        self.parameters = [p for _, p in named]
        self.params, self.iterations = params, iterations
        slow = {start: [p for name, p in named if name.startswith(start)] for start in shares or {}}
        known = {id(p) for group in slow.values() for p in group}
        kernel = {"fused": True} if fused else {}  # False would also turn off what PyTorch chooses itself
        self.adamw = torch.optim.AdamW(
            [p for p in self.parameters if id(p) not in known],
            params.lr,
            params.betas,
            weight_decay=params.weight_decay,
            **kernel,
        )
        self.shares = [1.0]
        for start, group in slow.items():
            self.adamw.add_param_group({"params": group})
            self.shares.append(shares[start])
        if quantiles:
            self.adamw.add_param_group({"params": quantiles, "lr": self.QUANTILE_LR, "weight_decay": 0.0})

    def lr(self, at: float) -> float:
        """Learning rate at a place in the stage, in iterations: linear warm-up, then a cosine to `lr_end`."""
        p = self.params
        if at < p.warmup:
            return min(p.lr, p.lr * (at + 1) / p.warmup)
        share = min(1.0, (at - p.warmup) / max(1, self.iterations - p.warmup))
        end = p.lr if p.lr_end is None else p.lr_end
        return end + (p.lr - end) * 0.5 * (1 + math.cos(math.pi * share))

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def clip(self) -> Tensor:
        """Clip the accumulated gradient; its norm before, a scalar on the device."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.params.clip or math.inf)

    def update(self, at: float) -> None:
        for group, share in zip(self.adamw.param_groups, self.shares, strict=False):  # the quantiles' comes last
            group["lr"] = share * self.lr(at)
        self.adamw.step()

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
