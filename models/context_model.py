"""The residual's symbols in passes: every symbol's table is chosen, in integers, by symbols that are decoded already.

Channels of s are in 8 groups, the busiest first and in the smallest ones (ELIC, He et al. 2022); a group is decoded at every
second position, as on a chessboard, and then at the others (He et al. 2021). A network of integers (integers.py) sees the
symbols of earlier passes at a position and at its four neighbours, and what h_s says of the position, and gives each symbol

    i' = clamp(i + step)     index of the table of sigma, for i of h_s
    u  = clamp(skew)         mean, in eighths of sigma, from -8 to 8

so that a symbol is coded with N(sigma' u / 8, sigma'^2), or rather with what was counted there, instead of N(0, sigma^2). The
symbols are those of a codec without it, and so are the pictures; only bytes are fewer. Nothing of a pass depends on the pass
itself or a later one, so its positions are computed together. Axes: M channels of s, h and w latent rows and columns, P
positions of a pass, C its channels.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.entropy_coding import SectionDecoder, SectionEncoder, own_bits, own_tables
from models.integers import (
    ACTIVATION_UNIT,
    IntegerConv,
    IntegerEmbedding,
    IntegerNetwork,
    bounded,
    floor_through,
    product,
    rectified,
    sums_are_exact,
)
from models.residual_networks import SCALES

GROUPS = 8
PASSES = 2 * GROUPS
SKEWS = 8  # |u| at most
TABLES = "tables"  # key of the tables among a model's integers
TABLES_SHAPE = (SCALES, SKEWS + 1, 63)
TAPS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # rows and columns from a position to what it sees
SEEN = 3  # |n| at most that the network is shown
MOST_CHANNELS = 246  # of s: with more, sums of the network would not be exact
_STEP_UNIT, _SKEW_UNIT = 4, 2  # units of the network's output per step of i' and of u
_REACHES = (2, 4, 8, 16, 31)  # symbols whose |n| is bounded alike are coded together
_PART = 4096  # positions that are in memory at once; part of the format, as symbols are coded class after class within


def grouped(activity: np.ndarray) -> np.ndarray:
    """Group of every channel, int64 (M,), by how busy it is: the first j groups hold a share j (j + 3) / 88 of them."""
    j = np.arange(1, GROUPS + 1)
    ends = len(activity) * j * (j + 3) / (GROUPS * (GROUPS + 3))
    rank = np.argsort(np.argsort(-activity, kind="stable"), kind="stable")
    return np.searchsorted(ends, rank, side="right")


def parts(h: int, w: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(pass, rows, columns) in the order of the file, at most so many positions at a time, row by row."""
    rows, columns = np.mgrid[:h, :w].reshape(2, -1)
    for number in range(PASSES):
        ours = np.flatnonzero((rows + columns) % 2 == number % 2)
        for start in range(0, len(ours), _PART):
            yield number, rows[ours[start : start + _PART]], columns[ours[start : start + _PART]]


def bordered(n: np.ndarray) -> np.ndarray:
    """Symbols (M, h, w) with a border of zeros, channels last: (h + 2, w + 2, M), int8."""
    return np.pad(n.astype(np.int8).transpose(1, 2, 0), ((1, 1), (1, 1), (0, 0)))


def contexts(grid: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Symbols at the taps of positions, from a `bordered` grid: int8 (P, TAPS, M)."""
    return np.stack([grid[rows + 1 + down, columns + 1 + right] for down, right in TAPS], axis=1)


def activations(context: Tensor, index: Tensor) -> Tensor:
    """What the network starts from: symbols at the taps, (P, any), and i, (P, M) -> (P, twice as many + M)."""
    signed = context.clamp(-SEEN, SEEN) * ACTIVATION_UNIT
    return torch.cat([signed, signed.abs(), index], dim=1)


def moved(out: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """i' and u of symbols by the network's output, (P, 2, C), and their i, (P, C): integers, (P, C) each."""
    step, skew = floor_through(out[:, 0] / _STEP_UNIT), floor_through(out[:, 1] / _SKEW_UNIT)
    return bounded(index + step, 0, SCALES - 1), bounded(skew, -SKEWS, SKEWS)


class ContextNetwork(IntegerNetwork):
    """What is known around positions of a pass -> i' and u of its symbols, an integer network.

    Attributes:
        group: of every channel, int64 (M,).
    """

    def __init__(self, channels: int, width: int = 128):
        super().__init__()
        self.first = IntegerConv((2 * len(TAPS) + 1) * channels, width, 1, largest=SEEN * ACTIVATION_UNIT)
        self.of_pass = IntegerEmbedding(PASSES, width)
        self.hidden = IntegerConv(width, width, 1)
        self.out = IntegerConv(width, 2 * channels, 1)
        nn.init.zeros_(self.out.weight)
        self.register_buffer("group", torch.from_numpy(grouped(np.zeros(channels))))

    @staticmethod
    def width_of(state: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The width of a state dict; nothing, which leaves the usual one, where it does not tell it."""
        hidden = state.get("hidden.weight", torch.empty(0))
        return (len(hidden),) if hidden.ndim == 4 and len(hidden) and sums_are_exact(len(hidden), 1) else ()

    def members(self, number: int) -> Tensor:
        """Channels of a pass: int64 (C,)."""
        return torch.nonzero(self.group == number // 2)[:, 0]

    def known(self, number: int) -> Tensor:
        """Which symbols at the taps a pass knows, bool (TAPS, M)."""
        at_tap = torch.tensor([(number + down + right) % 2 for down, right in TAPS], device=self.group.device)
        return 2 * self.group + at_tap[:, None] < number

    def forward(self, number: int, context: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """All symbols at the taps of positions of a pass, (P, TAPS, M), and i, (P, M) -> i' and u, (P, C) each."""
        context = (context * self.known(number)).flatten(1)
        a = product(activations(context, index), *self.first.matrix())  # P W
        a = rectified(a + self.of_pass.rows()[number])
        a = rectified(product(a, *self.hidden.matrix()))
        out = product(a, *self.out.matrix()).unflatten(1, (2, -1))  # P 2 M
        return moved(out[:, :, (members := self.members(number))], index[:, members])


@dataclass(frozen=True)
class _Class:
    """Symbols of one reach: tables of i' and u for the coder, (SCALES, 2 SKEWS + 1, 2 reach + 1)."""

    reach: int
    masses: np.ndarray


class ContextModel:
    """The released model: codes and decodes the residual's symbols, on the CPU whatever becomes of the codec.

    In float32: its layers are matrix products whose partial sums float32 holds exactly, in any order.

    Args:
        tables: integer frequencies of n = -31 to 31 by i' and |u|, int32 (SCALES, SKEWS + 1, 63), each at least 1; of a
            negative u they are mirrored.
        reach: of |n| by h_s's index, (SCALES,).
    """

    def __init__(self, network: ContextNetwork, tables: np.ndarray, reach: np.ndarray):
        self.network = network = copy.deepcopy(network).float().cpu().eval().requires_grad_(False)
        self.tables = tables
        self._known = [network.known(number).flatten() for number in range(PASSES)]
        first, bias = network.first.matrix()
        one = torch.ones(len(network.group), dtype=torch.bool)
        self._first = [(first[torch.cat([known, known, one])], bias) for known in self._known]
        self._hidden, self._out = network.hidden.matrix(), network.out.matrix()
        self._of_pass = network.of_pass.rows()  # PASSES W
        self._members = [network.members(number).numpy() for number in range(PASSES)]
        self._class = np.searchsorted(_REACHES, reach)  # by i
        both = np.concatenate([tables[:, :0:-1, ::-1], tables], axis=1).astype(np.float64)
        middle = both.shape[2] // 2
        self._classes = [
            _Class(r, own_tables(cut.reshape(-1, 2 * r + 1)).reshape(cut.shape))
            for r in _REACHES
            for cut in [both[:, :, middle - r : middle + r + 1]]
        ]

    def integers(self) -> dict[str, Tensor]:
        """All that it codes with, for a release: the network's integers and the tables."""
        return self.network.integers() | {TABLES: torch.from_numpy(self.tables)}

    def encode(self, n: np.ndarray, index: np.ndarray) -> bytes:
        """The section of symbols n (M, h, w) of h_s's indices i, uint8 (M, h, w)."""
        encoder = SectionEncoder()
        for symbols, masses, _ in self._coded(n, index):
            encoder.add(symbols, masses)
        return encoder.close()

    def bits(self, n: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Ideal cost of every symbol: arguments as `encode`; float64 (M, h, w)."""
        bits = np.empty(n.shape)
        for symbols, masses, at in self._coded(n, index):
            bits[at] = own_bits(symbols, masses)
        return bits

    def decode(self, section: bytes, index: np.ndarray) -> np.ndarray:
        """Inverse of `encode`: int8 (M, h, w). Accepts exactly what the encoder writes.

        Raises:
            BitstreamError: a section that no encoder writes with these indices.
        """
        decoder = SectionDecoder(section, "residual")
        grid = bordered(np.zeros(index.shape))
        for number, rows, columns in parts(*index.shape[1:]):
            for reach, masses, (channel, row, column) in self._tables(grid, index, number, rows, columns):
                grid[row + 1, column + 1, channel] = decoder.take_own(masses) - reach
        decoder.close()
        return np.ascontiguousarray(grid[1:-1, 1:-1].transpose(2, 0, 1))

    def _coded(self, n: np.ndarray, index: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, tuple]]:
        """Symbols from 0 up, their tables and where they are, in the file's order."""
        grid = bordered(n)
        for number, rows, columns in parts(*n.shape[1:]):
            for reach, masses, at in self._tables(grid, index, number, rows, columns):
                yield n[at] + reach, masses, at

    def _tables(self, grid: np.ndarray, index: np.ndarray, number: int, rows: np.ndarray, columns: np.ndarray):
        """(reach, tables for the coder, (channels, rows, columns)) of a part's symbols, class by class.

        Args:
            grid: a `bordered` one that holds the symbols of earlier passes; the others are not looked at.
        """
        scale, skew = self.chosen(grid, index, number, rows, columns)
        members = self._members[number]
        classes = self._class[index[members[:, None], rows, columns].T]
        for which, one in enumerate(self._classes):
            position, channel = np.nonzero(classes == which)
            if position.size:
                at = members[channel], rows[position], columns[position]
                pick = scale[position, channel], skew[position, channel] + SKEWS
                yield one.reach, one.masses[pick], at

    @torch.inference_mode()
    def chosen(
        self, grid: np.ndarray, index: np.ndarray, number: int, rows: np.ndarray, columns: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """i' and u of the symbols at positions of a pass: int64 (P, C). Arguments as `bits` has them, n in a `bordered` grid."""
        weight, bias = self._out
        members = self._members[number]
        ours = np.concatenate([members, members + len(index)])  # of what the last layer gives
        context = torch.from_numpy(contexts(grid, rows, columns)).flatten(1)[:, self._known[number]]
        i = torch.from_numpy(index[:, rows, columns].T).float()
        with torch.autocast("cpu", enabled=False):
            a = product(activations(context.float(), i), *self._first[number])
            a = product(rectified(a + self._of_pass[number]), *self._hidden)
            out = product(rectified(a), weight[:, ours], bias[ours]).unflatten(1, (2, -1))
            return tuple(values.long().numpy() for values in moved(out, i[:, members]))
