"""Latent residual r = x - y <-> integers: a mean-scale hyperprior (Minnen et al. 2018) with gains per level.

    s = g_a(x - y, y)         s_g = gain_g m(y) s        z = h_a(s_g)          n_z = round(z - median)
    i = h_s(n_z, k)           index of the table of sigma: integers in, integers out; symbols that are known refine it
                              (context_model.py) where a release has a model for that
    mu = m_s(n_z, k, y)       n = round(s_g - mu)        s^ = n + mu           r^ = g_s(s^ / (gain_g m(y)), y)

Level g is real, from 1 to L; between two levels the gains are interpolated geometrically (Cui et al. 2021), so that
one model has a continuous range of rates, and beyond 1 and L they can be extrapolated. In a file it is one byte, 1 to
255. m(y) is 1 without `masking`; with it, above 1 where the base is smooth and an error shows, below 1 where it is busy.
With `stretch` b, decoders have s^ = (1 + b (L - g) / (L - 1)) n + mu. Axes: N batch, d latent channels, M channels of s,
C_z channels of z, h and w latent rows and columns.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models import entropy_coding
from models.blocks import local_mean
from models.context_model import ContextModel
from models.integers import bounded, round_through
from models.residual_networks import (
    HYPER_STRIDE,
    SCALE_MIN,
    SCALE_STEP,
    HyperAnalysis,
    MeanNetwork,
    ResidualParams,
    ScaleNetwork,
    Transform,
    hyper_size,
)

LEVEL_CODES = 255
HYPER_REACH = 15  # |n_z| at most: 16 n_z must stay an activation
SYMBOL_REACH = 31  # |n| at most
_TILE, _RIM = 32, 2  # of h_s, in positions of z: the rim's outer half sees padding in place of its neighbours


@dataclass(frozen=True)
class ResidualTables:
    """Integer frequencies, int32, centred on the symbol 0; 0 where a symbol is never coded, else rows sum to 2^16.

    Attributes:
        hyper: of n_z, by level and channel, (L, C_z, 2 * HYPER_REACH + 1).
        symbols: of n, by index i, (SCALES, 2 * SYMBOL_REACH + 1).
    """

    hyper: np.ndarray
    symbols: np.ndarray

    def reach(self, table: str) -> np.ndarray:
        """Largest symbol of every table of `hyper` or `symbols`."""
        return (np.count_nonzero(getattr(self, table), axis=-1) - 1) // 2


@dataclass(frozen=True)
class Symbols:
    """The integers of one picture's residual sections: hyper n_z (C_z, h', w'), residual n and its table index i, (M, h, w).

    All arrays of integers; small ones, because a picture may be large.
    """

    hyper: np.ndarray
    residual: np.ndarray
    index: np.ndarray


@dataclass(frozen=True)
class ResidualOutput:
    """A training pass: r_hat, N x d x h x w; bits of z and of s per sample, (N,) each."""

    r_hat: Tensor
    hyper_bits: Tensor
    residual_bits: Tensor


def level_of(code: int, params: ResidualParams) -> float:
    """Level g, 1 to L and what is extrapolated on either side, of the byte that a file holds, 1 to 255."""
    below, above = params.extrapolated
    return 1 - below + (code - 1) / (LEVEL_CODES - 1) * (params.levels - 1 + below + above)


def node_of(code: int, params: ResidualParams) -> int:
    """The nearest level of 1 to L, counted from 0: its hyper tables serve."""
    return min(max(math.floor(level_of(code, params) - 0.5), 0), params.levels - 1)


def beyond_middle(code: int, params: ResidualParams) -> float:
    """How far a code's level is on the way from L / 2 to L: 0 below, 1 above."""
    return min(max(2 * level_of(code, params) / params.levels - 1, 0.0), 1.0)


def _tile(start: int) -> tuple[slice, slice, slice]:
    """A tile of z from `start` along one side: positions of z with the rim, of the latent with it, and without."""
    first, end = max(0, start - _RIM), start + _TILE + _RIM
    inner = slice(HYPER_STRIDE * start, HYPER_STRIDE * (start + _TILE))
    return slice(first, end), slice(HYPER_STRIDE * first, HYPER_STRIDE * end), inner


class ResidualHyperprior(nn.Module):
    """The residual codec. `forward` trains; `symbols` and `restore` code.

    Attributes:
        tables: integer tables, built at release; None before.
        context_model: codes the residual's symbols in passes, fitted at release; None without one.
        rate_model: densities, while training; None in released weights.
    """

    def __init__(self, params: ResidualParams, latent_channels: int, codebook_size: int):
        super().__init__()
        p, d = params, latent_channels
        self.params = params
        self.analysis = Transform(d, d, p.channels, p.width, p.blocks)  # g_a
        self.synthesis = Transform(p.channels, d, d, p.width, p.blocks)  # g_s
        self.hyper_analysis = HyperAnalysis(p.channels, p.width, p.hyper_channels)  # h_a
        self.scale_network = ScaleNetwork(p, codebook_size)  # h_s
        self.mean_network = MeanNetwork(p, d, codebook_size)  # m_s
        nodes = torch.linspace(math.log(p.first_gain), math.log(p.last_gain), p.levels)
        self.log_gain = nn.Parameter(nodes[:, None].repeat(1, p.channels))
        self.register_buffer("median", torch.zeros(p.hyper_channels))
        self.tables: ResidualTables | None = None
        self.context_model: ContextModel | None = None
        self.rate_model: nn.Module | None = None
        self._exact: tuple[ScaleNetwork] | None = None  # in a tuple, so that no cast and no state dict finds it

    def train_rates(self) -> None:
        """Add the densities that training needs."""
        from models.rate_model import RateModel  # CompressAI takes seconds to import: never for coding

        self.rate_model = RateModel(self.params.hyper_channels).to(self.log_gain)

    def freeze(self, tables: ResidualTables | None) -> None:
        """Fix the integers: tables, and the integer network in float64 on the CPU, whatever becomes of the module."""
        self.tables = tables
        self._exact = (copy.deepcopy(self.scale_network).double().cpu().requires_grad_(False),)

    # Steps shared by training, coding and decoding ------------------------------------------------------------------

    def gain(self, level: Tensor) -> Tensor:
        """gain_g of levels (N,): N x M x 1 x 1. Below 1 and above L the outer intervals go on."""
        position = level - 1
        low = position.floor().clamp(0, self.params.levels - 2).long()
        share = (position - low).to(self.log_gain.dtype)[:, None]
        log_gain = self.log_gain[low] * (1 - share) + self.log_gain[low + 1] * share
        return log_gain.exp()[:, :, None, None]

    def contrast_gain(self, y: Tensor) -> Tensor | float:
        """m = ((1 + v / floor) / 2)^-masking, v the variance of y over 3x3 positions, of all channels: N x 1 x h x w.

        Contrast masking: an error is seen, and counts in MS-SSIM, by the contrast around it. Variance-adaptive quantisation
        of video encoders, but from what the decoder knows: no bit tells it. No gradient passes: VQ-D is not to be taught a
        busy y for the sake of coarse steps.
        """
        if not self.params.masking:
            return 1.0
        known = y.detach().float()
        variance = (local_mean(known.square()) - local_mean(known).square()).sum(1, keepdim=True).clamp(min=0)
        return ((1 + variance / self.params.masking_floor) / 2).pow(-self.params.masking).to(y)

    def centred(self, s_g: Tensor) -> Tensor:
        """z - median: N x C_z x h' x w'."""
        return self.hyper_analysis(s_g) - self.median.view(1, -1, 1, 1)

    # Training -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, y: Tensor, k: Tensor, level: Tensor, noise: Tensor) -> ResidualOutput:
        """One training pass: rates with uniform noise, reconstruction with rounding (Minnen and Singh 2020).

        To be called without autocast: roundings, densities and the integer network need their full precision.

        Args:
            x, y: N x d x h x w. k: int64 N x h x w. level: (N,) in [1, L].
            noise: uniform in [-1/2, 1/2), (N, size), as many numbers as s and z have.
        Raises:
            RuntimeError: there are no densities; released weights have tables in their place.
        """
        if self.rate_model is None:
            raise RuntimeError("no densities to train with: call train_rates() first; released weights only code")
        self.median.copy_(self.rate_model.median)
        gain = self.gain(level.clamp(min=1)) * self.contrast_gain(y)  # level 0, which sends nothing, is masked later
        s_g = gain * self.analysis(x - y, y)  # N M h w
        z = self.centred(s_g)  # N C_z h' w'
        n_z = round_through(bounded(z, -HYPER_REACH, HYPER_REACH))
        sigma = SCALE_MIN * SCALE_STEP ** self.scale_network(n_z, k)
        mu = self.mean_network(n_z, k, y)
        noise_s, noise_z = noise.split([s_g[0].numel(), z[0].numel()], dim=1)
        noisy_z = z + self.median.view(1, -1, 1, 1) + noise_z.view_as(z)
        hyper_bits, residual_bits = self.rate_model(noisy_z, s_g + noise_s.view_as(s_g), mu, sigma)
        s_hat = round_through(s_g - mu) + mu
        return ResidualOutput(self.synthesis(s_hat / gain, y), hyper_bits, residual_bits)

    def noise_size(self, h: int, w: int) -> int:
        """How many uniform numbers a sample's training pass takes."""
        return self.params.channels * h * w + self.params.hyper_channels * math.prod(hyper_size(h, w))

    # Coding ---------------------------------------------------------------------------------------------------------

    def symbols(self, s: Tensor, y: Tensor, k: Tensor, code: int, tables: ResidualTables | None = None) -> Symbols:
        """The integers that the encoder sends at a level.

        Args:
            s: g_a(x - y, y), 1 x M x h x w. y: 1 x d x h x w. k: int64 1 x h x w. code: of the level, 1 to 255.
            tables: symbols are clamped to them; None (before there are any) clamps to the largest reach.
        """
        s_g = self.gain(self._level(code, s.device)) * self.contrast_gain(y) * s
        z = self.centred(s_g)[0].double().cpu().round().numpy().astype(np.int64)  # C_z h' w'
        reach = HYPER_REACH if tables is None else tables.reach("hyper")[node_of(code, self.params), :, None, None]
        n_z = np.clip(z, -reach, reach)
        index = self.table_index(n_z, k)
        mu = self._mean(n_z, k, y)
        n = (s_g - mu)[0].double().cpu().round().numpy().astype(np.int64)  # M h w
        reach = SYMBOL_REACH if tables is None else tables.reach("symbols")[index]
        return Symbols(n_z, np.clip(n, -reach, reach), index)

    def table_index(self, n_z: np.ndarray, k: Tensor) -> np.ndarray:
        """i = h_s(n_z, k), exactly: integers (C_z, h', w') and 1 x h x w -> uint8 (M, h, w).

        Tile by tile, each with the rim that its convolutions see: the same integers, in memory that a picture's size
        does not decide.
        """
        hyper, k = torch.from_numpy(n_z)[None], k.cpu()
        index = np.empty((self.params.channels, *k.shape[1:]), dtype=np.uint8)
        with torch.autocast("cpu", enabled=False):
            for top in range(0, hyper.shape[2], _TILE):
                for left in range(0, hyper.shape[3], _TILE):
                    (z_rows, rows, inner_rows), (z_columns, columns, inner_columns) = _tile(top), _tile(left)
                    tile = self._exact[0](hyper[:, :, z_rows, z_columns].double(), k[:, rows, columns])[0].byte()
                    _, h, w = index[:, inner_rows, inner_columns].shape
                    at_row, at_column = inner_rows.start - rows.start, inner_columns.start - columns.start
                    index[:, inner_rows, inner_columns] = tile[:, at_row : at_row + h, at_column : at_column + w]
        return index

    def hyper_coding(self, shape: tuple[int, int, int], code: int) -> tuple[np.ndarray, np.ndarray]:
        """Group of every symbol of n_z, flattened, and the tables of the groups."""
        channels = np.arange(shape[0], dtype=np.uint16).repeat(shape[1] * shape[2])
        return channels, self.tables.hyper[node_of(code, self.params)]

    def residual_coding(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Group of every symbol of n, flattened, and the tables of the groups."""
        return index.ravel(), self.tables.symbols

    def sections(self, symbols: Symbols, code: int) -> tuple[bytes, bytes]:
        """n_z and n of a level, coded: inverse of `read`."""
        hyper = entropy_coding.encode_symbols(symbols.hyper.ravel(), *self.hyper_coding(symbols.hyper.shape, code))
        if self.context_model:
            return hyper, self.context_model.encode(symbols.residual, symbols.index)
        return hyper, entropy_coding.encode_symbols(symbols.residual.ravel(), *self.residual_coding(symbols.index))

    def read(self, hyper: bytes, residual: bytes, k: Tensor, code: int) -> Symbols:
        """The integers of both sections, of a base k, 1 x h x w.

        Raises:
            BitstreamError: sections that no encoder writes with this base.
        """
        shape = (self.params.hyper_channels, *hyper_size(*k.shape[1:]))
        n_z = entropy_coding.decode_symbols(hyper, *self.hyper_coding(shape, code), "hyper").reshape(shape)
        index = self.table_index(n_z, k)
        if self.context_model:
            return Symbols(n_z, self.context_model.decode(residual, index), index)
        n = entropy_coding.decode_symbols(residual, *self.residual_coding(index), "residual")
        return Symbols(n_z, n.reshape(index.shape), index)

    def bits(self, symbols: Symbols, code: int) -> dict[str, np.ndarray]:
        """Ideal cost of every symbol, float64, by section and in its shape."""
        n_z, n, index = symbols.hyper, symbols.residual, symbols.index
        hyper = entropy_coding.symbol_bits(n_z.ravel(), *self.hyper_coding(n_z.shape, code)).reshape(n_z.shape)
        if self.context_model:
            return {"hyper": hyper, "residual": self.context_model.bits(n, index)}
        return {
            "hyper": hyper,
            "residual": entropy_coding.symbol_bits(n.ravel(), *self.residual_coding(index)).reshape(n.shape),
        }

    def restore(self, n_z: np.ndarray, n: np.ndarray, k: Tensor, y: Tensor, code: int) -> Tensor:
        """r^ from decoded integers and y: 1 x d x h x w."""
        s_hat = self._stretched(code) * torch.from_numpy(n)[None].to(y) + self._mean(n_z, k, y)
        return self.synthesis(s_hat / (self.gain(self._level(code, y.device)) * self.contrast_gain(y)), y)

    def _mean(self, n_z: np.ndarray, k: Tensor, y: Tensor) -> Tensor:
        return self.mean_network(torch.from_numpy(n_z)[None].to(y), k.to(y.device), y)

    def _stretched(self, code: int) -> float:
        """What the decoder multiplies n by: networks trained with squared errors are timid where they know little."""
        above_first = (level_of(code, self.params) - 1) / (self.params.levels - 1)
        return 1 + self.params.stretch * (1 - min(max(above_first, 0.0), 1.0))

    def _level(self, code: int, device: torch.device) -> Tensor:
        return torch.tensor([level_of(code, self.params)], device=device, dtype=torch.float64)
