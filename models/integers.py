"""Layers that compute in integers: the same result on every machine, thread count and precision.

An activation a stands for a / 16, a weight w for w / 64. Sums of products are integers, shifted back by 6 bits with
floor. Training runs the very same arithmetic on float32 tensors that hold integers, exact because every sum stays
below 2^24, and lets gradients pass straight through the roundings (Ballé, Johnston and Minnen, "Integer networks for
data compression with latent-variable models", ICLR 2019).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATION_UNIT = 16  # activations are multiples of 1/16
ACTIVATION_MAX = 255
WEIGHT_UNIT = 64  # weights are multiples of 1/64
WEIGHT_MAX = 127
BIAS_MAX = 4095  # in activation units
_EXACT = 1 << 24  # float32 represents all integers up to here


def straight_through(rounded: Tensor, exact: Tensor) -> Tensor:
    """The value of `rounded` with the gradient of `exact`."""
    return exact + (rounded - exact).detach() if exact.requires_grad else rounded


def round_through(x: Tensor) -> Tensor:
    """round(x) with the gradient of x."""
    return straight_through(x.round(), x)


def floor_through(x: Tensor) -> Tensor:
    """floor(x) with the gradient of x."""
    return straight_through(x.floor(), x)


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        low, high = ctx.bounds
        inwards = ((x >= low) | (gradient < 0)) & ((x <= high) | (gradient > 0))
        return gradient * inwards, None, None


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """clamp(x, low, high) whose gradient also passes outside, where a step of descent would lead back in."""
    return _Bounded.apply(x, low, high)


def rectified(x: Tensor) -> Tensor:
    """ReLU that saturates at the largest activation."""
    return bounded(x, 0, ACTIVATION_MAX)


def sums_are_exact(in_channels: int, kernel_size: int) -> bool:
    """Whether float32 holds every sum of a convolution of integers."""
    largest = in_channels * kernel_size**2 * WEIGHT_MAX * ACTIVATION_MAX + BIAS_MAX * WEIGHT_UNIT
    return largest < _EXACT


class IntegerConv(nn.Module):
    """Convolution of integer activations |a| <= 255 with integer weights: N x C_in x H x W -> N x C_out x H x W.

    The parameters are floats in natural units; what is computed with are their integers.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        if not sums_are_exact(in_channels, kernel_size):
            raise ValueError(f"{in_channels} channels in a {kernel_size}x{kernel_size} kernel: sums would not be exact")
        self.padding = kernel_size // 2
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def integers(self) -> tuple[Tensor, Tensor]:
        """Weight, in 1/64, and bias, in the unit of the sums, as they are computed with."""
        weight = round_through(bounded(self.weight * WEIGHT_UNIT, -WEIGHT_MAX, WEIGHT_MAX))
        return weight, round_through(bounded(self.bias * ACTIVATION_UNIT, -BIAS_MAX, BIAS_MAX)) * WEIGHT_UNIT

    def forward(self, a: Tensor) -> Tensor:
        weight, bias = self.integers()
        sums = round_through(F.conv2d(a, weight, bias, padding=self.padding))  # exact, but for a GPU's transforms
        return floor_through(sums / WEIGHT_UNIT)


class IntegerEmbedding(nn.Module):
    """A row of integer activations per symbol: int64 N x h x w -> N x C x h x w."""

    def __init__(self, count: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, channels))

    def forward(self, symbols: Tensor) -> Tensor:
        rows = F.embedding(symbols, self.weight).permute(0, 3, 1, 2)
        return round_through(bounded(rows * ACTIVATION_UNIT, -ACTIVATION_MAX, ACTIVATION_MAX))
