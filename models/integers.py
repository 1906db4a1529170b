"""Layers that compute in integers: the same result on every machine, thread count and precision.

An activation a stands for a / 16, a weight w for w / 64. Sums of products are integers, shifted back by 6 bits with
floor. Training runs the very same arithmetic on float32 tensors that hold integers, exact because every sum stays
below 2^24, and lets gradients pass straight through the roundings (Ballé, Johnston and Minnen, "Integer networks for
data compression with latent-variable models", ICLR 2019).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATION_UNIT = 16  # activations are multiples of 1/16
ACTIVATION_MAX = 255
WEIGHT_UNIT = 64  # weights are multiples of 1/64
WEIGHT_MAX = 127
BIAS_MAX = 4095  # in activation units
_EXACT = 1 << 24  # float32 represents all integers up to here


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rounding):
        return rounding(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def round_through(x: Tensor) -> Tensor:
    """round(x) with the gradient of x."""
    return _Through.apply(x, torch.round)


def floor_through(x: Tensor) -> Tensor:
    """floor(x) with the gradient of x."""
    return _Through.apply(x, torch.floor)


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


def sums_are_exact(in_channels: int, kernel_size: int, largest: int = ACTIVATION_MAX) -> bool:
    """Whether float32 holds every sum of a convolution of integers, of activations that are `largest` at most."""
    return in_channels * kernel_size**2 * WEIGHT_MAX * largest + BIAS_MAX * WEIGHT_UNIT < _EXACT


class IntegerConv(nn.Module):
    """Convolution of integer activations |a| <= 255 with integer weights: N x C_in x H x W -> N x C_out x H x W.

    The parameters are floats in natural units; what is computed with are their integers.

    Args:
        largest: |a| at most, where that is less: more channels then have exact sums.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, largest: int = ACTIVATION_MAX):
        super().__init__()
        if not sums_are_exact(in_channels, kernel_size, largest):
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

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Weight, C_in x C_out, and bias of a 1x1 convolution as `product` takes them."""
        weight, bias = self.integers()
        return weight.flatten(1).T / WEIGHT_UNIT, bias / WEIGHT_UNIT


def product(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a 1x1 convolution gives of activations, M x C_in -> M x C_out, by its `matrix`: exact in float32, in any order."""
    return floor_through(torch.addmm(bias, a, weight))


class IntegerEmbedding(nn.Module):
    """A row of integer activations per symbol: int64 N x h x w -> N x C x h x w."""

    def __init__(self, count: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, channels))

    def rows(self) -> Tensor:
        """The activations of every symbol: (count, C)."""
        return round_through(bounded(self.weight * ACTIVATION_UNIT, -ACTIVATION_MAX, ACTIVATION_MAX))

    def forward(self, symbols: Tensor) -> Tensor:
        return F.embedding(symbols, self.rows()).permute(0, 3, 1, 2)


class IntegerNetwork(nn.Module):
    """A network of the layers above, which is stored as the integers that it computes with."""

    def integers(self) -> dict[str, Tensor]:
        """By parameter: weights in 1/64 as int8, biases and embeddings in 1/16 as int16; buffers as they are."""
        found, units = self.state_dict(), self._units()
        for key, (unit, largest, kind) in units.items():
            found[key] = (found[key] * unit).round().clamp(-largest, largest).to(kind)
        return found

    def natural(self, integers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of `integers`; what this network does not have, or not in this shape, comes back as it is."""
        units, own = self._units(), self.state_dict()
        ours = {key for key, value in integers.items() if key in units and value.shape == own[key].shape}
        return {key: value / units[key][0] if key in ours else value for key, value in integers.items()}

    def _units(self) -> dict[str, tuple[int, int, torch.dtype]]:
        """Unit, largest magnitude and type of every parameter's integers."""
        units = {}
        for name, module in self.named_modules():
            if isinstance(module, IntegerEmbedding):
                units[f"{name}.weight"] = ACTIVATION_UNIT, ACTIVATION_MAX, torch.int16
            elif isinstance(module, IntegerConv):
                units[f"{name}.weight"] = WEIGHT_UNIT, WEIGHT_MAX, torch.int8
                units[f"{name}.bias"] = ACTIVATION_UNIT, BIAS_MAX, torch.int16
        return units
