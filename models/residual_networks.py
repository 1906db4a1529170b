"""The networks of the residual codec: g_a and g_s, h_a, h_s and m_s (residual_hyperprior.py says how they are joined).

Axes: N batch, d latent channels, M channels of s, C_z channels of z, h and w latent rows and columns.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.integers import (
    ACTIVATION_UNIT,
    IntegerConv,
    IntegerEmbedding,
    bounded,
    floor_through,
    rectified,
    sums_are_exact,
)
from utils.config import require, require_from

HYPER_STRIDE = 4  # latent positions per position of z, along each side
SCALES = 48  # tables, for sigma from SCALE_MIN up by SCALE_STEP each; h_s gives the index of one
SCALE_MIN, SCALE_STEP = 0.11, 1.112
_INDEX_UNIT = 4  # activation units per table index
_FIRST_INDEX = 16  # of an untrained network


@dataclass(frozen=True)
class ResidualParams:
    """Size of the residual codec.

    Attributes:
        channels: M, of s. width: of the hidden layers. blocks: residual blocks in g_a and in g_s.
        hyper_channels: C_z, of z. scale_width: of the integer network. code_width: of the index embedding in m_s.
        levels: L, at least 2. extrapolated: how far files may go below level 1 and beyond L, in levels.
        first_gain, last_gain: gains that training starts from, geometric in between.
        masking: how much finer symbols are where the base is smooth, as an exponent, and coarser where it is busy; 0: alike.
        masking_floor: squared deviation of the base, summed over channels, below which it counts as smooth.
        stretch: share by which a decoder puts symbols of level 1 further from their mean than the integers say; none at level
            L. Training knows nothing of it.
    """

    channels: int = 192
    width: int = 192
    blocks: int = 2
    hyper_channels: int = 48  # the sums of the integer network stay exact up to 56
    scale_width: int = 48
    code_width: int = 32
    levels: int = 6
    extrapolated: tuple[float, ...] = (0.0, 0.0)
    first_gain: float = 0.3
    last_gain: float = 1.5
    masking: float = 0.0
    masking_floor: float = 1.0
    stretch: float = 0.0

    @property
    def rules(self) -> dict[str, float]:
        """What may change after training: no network is of another size by it."""
        return {name: getattr(self, name) for name in ("masking", "masking_floor", "stretch")}

    def __post_init__(self):
        require_from(1, self, "channels", "width", "hyper_channels", "scale_width", "code_width")
        require_from(0, self, "blocks")
        require_from(2, self, "levels")
        for name in ("hyper_channels", "scale_width"):  # of h_s's 3x3 kernels
            value = getattr(self, name)
            require(sums_are_exact(value, 3), f"{name} {value}: too many for exact sums of the integer network")
        good = len(self.extrapolated) == 2 and all(0 <= e <= 2 for e in self.extrapolated)
        require(good, f"extrapolated {list(self.extrapolated)}: two numbers of levels, 0 to 2")
        require(0 <= self.masking <= 1, f"masking {self.masking}: 0 to 1")
        require(self.masking_floor > 0, f"masking_floor {self.masking_floor}: above 0")
        require(0 <= self.stretch <= 0.5, f"stretch {self.stretch}: 0 to 0.5")
        gains = self.first_gain, self.last_gain
        require(0 < gains[0] < gains[1], f"first_gain {gains[0]}, last_gain {gains[1]}: above 0, the smaller first")


def hyper_size(h: int, w: int) -> tuple[int, int]:
    """Rows and columns of z for a latent of h x w."""
    return -(-h // HYPER_STRIDE), -(-w // HYPER_STRIDE)


class Block(nn.Module):
    """x + conv(silu(conv(silu(x)))); no normalisation, which would hide the gain."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Transform(nn.Module):
    """a -> P a + f(a, y), with P a 1x1 convolution and f a small network that starts at zero."""

    def __init__(self, in_channels: int, y_channels: int, out_channels: int, width: int, blocks: int):
        super().__init__()
        self.linear = nn.Conv2d(in_channels, out_channels, 1)
        nn.init.orthogonal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.conv_in = nn.Conv2d(in_channels + y_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, a: Tensor, y: Tensor) -> Tensor:
        h = self.blocks(self.conv_in(torch.cat([a, y], dim=1)))
        return self.linear(a) + self.conv_out(F.silu(h))


class HyperAnalysis(nn.Module):
    """h_a: N x M x h x w -> N x C_z x ceil(h/4) x ceil(w/4), padded by edge values."""

    def __init__(self, channels: int, width: int, hyper_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, hyper_channels, 3, stride=2, padding=1)

    def forward(self, s: Tensor) -> Tensor:
        bottom, right = -s.shape[2] % HYPER_STRIDE, -s.shape[3] % HYPER_STRIDE
        s = F.pad(s, (0, right, 0, bottom), mode="replicate")
        return self.conv2(F.silu(self.conv1(s)))


class ScaleNetwork(nn.Module):
    """h_s: n_z and k, both integers, -> i in [0, SCALES), an integer network (integers.py)."""

    def __init__(self, params: ResidualParams, codebook_size: int):
        super().__init__()
        width = params.scale_width
        self.hyper = IntegerConv(params.hyper_channels, width, 3)
        self.code = IntegerEmbedding(codebook_size, width)
        self.hidden = IntegerConv(width, width, 3)
        self.out = IntegerConv(width, params.channels, 1)

    def forward(self, n_z: Tensor, k: Tensor) -> Tensor:
        """N x C_z x h' x w' (a float tensor of integers) and int64 N x h x w -> N x M x h x w, integers."""
        a = enlarged(self.hyper(n_z * ACTIVATION_UNIT), k.shape[1:])
        a = rectified(a + self.code(k))
        a = rectified(self.hidden(a))
        return floor_through(bounded(self.out(a) / _INDEX_UNIT + _FIRST_INDEX, 0, SCALES - 1))


class MeanNetwork(nn.Module):
    """m_s: n_z, k and y -> mu, N x M x h x w. It may be float: n is coded relative to it."""

    def __init__(self, params: ResidualParams, y_channels: int, codebook_size: int):
        super().__init__()
        p = params
        self.code = nn.Embedding(codebook_size, p.code_width)
        self.conv_in = nn.Conv2d(p.hyper_channels + p.code_width + y_channels, p.width, 3, padding=1)
        self.block = Block(p.width)
        self.conv_out = nn.Conv2d(p.width, p.channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, n_z: Tensor, k: Tensor, y: Tensor) -> Tensor:
        code = self.code(k).permute(0, 3, 1, 2)
        h = self.conv_in(torch.cat([enlarged(n_z, k.shape[1:]), code, y], dim=1))
        return self.conv_out(F.silu(self.block(h)))


def enlarged(n_z: Tensor, size: tuple[int, int]) -> Tensor:
    """Every position of z repeated over the latent positions it stands for, cropped to h x w."""
    full = n_z.repeat_interleave(HYPER_STRIDE, dim=2).repeat_interleave(HYPER_STRIDE, dim=3)
    return full[:, :, : size[0], : size[1]]
