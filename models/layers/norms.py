"""Group normalisation as every network uses it: with the SiLU or the modulation that follows it, in one place.

And the biases of convolutions beside it, which on CUDA are added on the way: PyTorch takes a pass over the map for each.

Axes: N batch, C channels, H and W rows and columns of a feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import fused_norm
from models.layers.sharing import is_sharing, shared_moments

in_place = True  # the option: outside training, SiLU writes over what it takes; the same bits, and a feature map less


class GroupNorm(nn.GroupNorm):
    """a(GN(x) (1 + scale) + shift), with a = SiLU or nothing. Parameters and keys are those of `nn.GroupNorm`.

    Inside `sharing`, all samples of all passes have the same means and variances: the first pass's, or those of all parts.

    Args:
        groups, channels, eps: as in `nn.GroupNorm`. silu: whether SiLU follows.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, silu: bool = False):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, before: Tensor | None = None
    ) -> Tensor:
        """N C H W -> N C H W; scale and shift, N C 1 1, come together or not at all. before: (C,), is added to x first."""
        if fused_norm.takes(x) and not is_sharing():
            affine = self.weight, self.bias
            return fused_norm.group_norm(x, self.num_groups, *affine, self.eps, scale, shift, self.silu, before)
        if before is not None:
            x = x + before.to(x.dtype).view(-1, 1, 1)
        moments = shared_moments(self, self._moments, x)
        h = super().forward(x) if moments is None else self._with(moments, x)
        if scale is not None:
            h = h * (1 + scale) + shift
        return F.silu(h, inplace=in_place and not torch.is_grad_enabled()) if self.silu else h

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of every channel's group over all samples: (C,) each, float32 at least."""
        n, c = x.shape[:2]
        groups = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(n, self.num_groups, -1)
        variance, mean = torch.var_mean(groups, dim=(0, 2), correction=0)
        return tuple(v.repeat_interleave(c // self.num_groups) for v in (mean, variance))

    def _with(self, moments: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        weight, bias = (p.to(moments[0].dtype) for p in (self.weight, self.bias))
        return F.batch_norm(x, *moments, weight, bias, eps=self.eps)


def convolved(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """conv(x), and its bias apart where the norm or the sum after it adds it on the way; None where it is in the map.

    For convolutions without hooks.
    """
    if is_sharing() or not fused_norm.takes(x):
        return conv(x), None
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding), conv.bias


def added(x: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
    """x + h, and the bias (C,) that `convolved` left out of h."""
    if bias is None:
        return x + h
    if x.dtype == h.dtype and fused_norm.takes(x) and fused_norm.takes(h):
        return fused_norm.added(x, h, bias)
    return x + h + bias.to(h.dtype).view(-1, 1, 1)
