"""Group normalisation as every network uses it: with the SiLU or the modulation that follows it, in one place.

Axes: N batch, C channels, H and W rows and columns of a feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

in_place = True  # the option: outside training, SiLU writes over what it takes; the same bits, and a feature map less


class GroupNorm(nn.GroupNorm):
    """a(GN(x) (1 + scale) + shift), with a = SiLU or nothing. Parameters and keys are those of `nn.GroupNorm`.

    Args:
        groups, channels, eps: as in `nn.GroupNorm`. silu: whether SiLU follows.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, silu: bool = False):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """N C H W -> N C H W; scale and shift, N C 1 1, come together or not at all."""
        h = super().forward(x)
        if scale is not None:
            h = h * (1 + scale) + shift
        return F.silu(h, inplace=in_place and not torch.is_grad_enabled()) if self.silu else h
