"""The base's indices in passes: every symbol's table is computed, in integers, from indices that are decoded already.

    0 4 2 4     pass 0: every fourth row and column, one table for all
    4 3 4 3     pass 1: the middles between these
    2 4 1 4     pass 2, 3, 4: the middles between all before
    4 3 4 3

Each pass doubles what is known. A network of integers (integers.py) sees the CONTEXT nearest positions of earlier passes
and gives every code a score, in sixteenths of a bit; the table holds 2^score, scaled to its total. Nothing of a pass
depends on the pass itself or a later one, so its positions are computed together. Axes: h, w rows and columns of indices,
M positions of a pass, K codes.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import distances
from models.entropy_coding import SectionDecoder, SectionEncoder, own_bits, own_tables
from models.integers import (
    ACTIVATION_UNIT,
    IntegerConv,
    IntegerEmbedding,
    IntegerNetwork,
    product,
    rectified,
    sums_are_exact,
)

PATTERN = np.array([[0, 4, 2, 4], [4, 3, 4, 3], [2, 4, 1, 4], [4, 3, 4, 3]])
PASSES = 1 + int(PATTERN.max())
CONTEXT = 16
_REACH = 3 * len(PATTERN)  # of the context, in rows and columns, at most
_ENTRIES = 1 << 19  # of tables that are in memory at once: fewer take longer
_ALIKE, _OWN = 0.2, 0.3  # at the start: scores' share of the codes' vectors, and how much of random weights is left
_NOTHING = 1e-3  # of the largest deviation: what has less is not brought to the others'
_LARGEST = 20  # log2 of the largest share before scaling; none is below 1


def _power(units: int) -> int:
    """floor(2^(units/16)), by roots of integers: the same on every machine."""
    value = 1 << units
    for _ in range(ACTIVATION_UNIT.bit_length() - 1):
        value = math.isqrt(value)
    return value


_SHARES = torch.tensor([_power(units) for units in range(ACTIVATION_UNIT * _LARGEST, -1, -1)], dtype=torch.float64)


def offsets(number: int) -> np.ndarray:
    """Rows and columns from any position of a pass to its context: (CONTEXT, 2), the nearest first; none for pass 0."""
    side = len(PATTERN)
    row, column = np.argwhere(PATTERN == number)[0]
    steps = np.stack(np.mgrid[-_REACH : _REACH + 1, -_REACH : _REACH + 1], axis=-1).reshape(-1, 2)
    steps = steps[PATTERN[(row + steps[:, 0]) % side, (column + steps[:, 1]) % side] < number]
    return steps[np.argsort((steps**2).sum(axis=1), kind="stable")[:CONTEXT]]


OFFSETS = [offsets(number) for number in range(PASSES)]


def positions(number: int, h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, (M,) each, of a pass's positions, row by row."""
    repeats = -(-h // len(PATTERN)), -(-w // len(PATTERN))
    return np.nonzero(np.tile(PATTERN, repeats)[:h, :w] == number)


def parts(h: int, w: int, codes: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(pass, rows, columns) in the order of the file, so many positions at a time that their tables are bounded."""
    size = _ENTRIES // codes
    for number in range(PASSES):
        rows, columns = positions(number, h, w)
        for start in range(0, len(rows), size):
            yield number, rows[start : start + size], columns[start : start + size]


def bordered(k: np.ndarray, codes: int) -> np.ndarray:
    """Indices (h, w) with a border as wide as contexts reach, which holds what stands for the unknown: K. int16."""
    return np.pad(k.astype(np.int16), _REACH, constant_values=codes)


def contexts(grid: np.ndarray, number: int, rows: np.ndarray, columns: np.ndarray, codes: int) -> np.ndarray:
    """What a pass knows around positions: int16 (M, CONTEXT), K outside the picture and, in pass 0, everywhere.

    Args:
        grid: a `bordered` one that holds the indices of earlier passes; the others are not looked at.
    """
    if number == 0:
        return np.full((len(rows), CONTEXT), codes, dtype=np.int16)
    down, right = OFFSETS[number].T + _REACH
    return grid[rows[:, None] + down, columns[:, None] + right]


class IndexNetwork(IntegerNetwork):
    """Contexts -> scores, an integer network: a first layer for each pass, and others that all share.

    Args:
        channels: of the embedding. wide, narrow: of hidden layers, and of the last one before the scores.
        middle: whether there is one more layer of the wide ones.
    """

    def __init__(self, codes: int, channels: int = 16, wide: int = 192, narrow: int = 112, middle: bool = True):
        super().__init__()
        self.codes = codes
        self.embedding = IntegerEmbedding(codes + 1, channels)
        nn.init.normal_(self.embedding.weight)
        self.first = nn.ModuleList(IntegerConv(CONTEXT * channels, wide, 1) for _ in range(PASSES))
        self.middle = IntegerConv(wide, wide, 1) if middle else None
        self.hidden = IntegerConv(wide, narrow, 1)
        self.out = IntegerConv(narrow, codes, 1)

    @staticmethod
    def sizes(state: Mapping[str, Tensor]) -> tuple[int, int, int, bool] | tuple[()]:
        """The sizes of a state dict; nothing, which leaves the usual ones, where it does not tell them."""
        embedding, hidden = (state.get(f"{name}.weight", torch.empty(0)) for name in ("embedding", "hidden"))
        if embedding.ndim != 2 or hidden.ndim != 4:
            return ()
        channels, (narrow, wide) = embedding.shape[1], hidden.shape[:2]
        if not all(size and sums_are_exact(size, 1) for size in (CONTEXT * channels, wide, narrow)):
            return ()
        return channels, wide, narrow, "middle.weight" in state

    @torch.no_grad()
    def start_alike(self, codebook: Tensor) -> None:
        """Codes that are near in the code book, (K, d_q), begin with like embeddings and like scores: what is learnt of one is
        learnt of its neighbours, and rare codes have few examples of their own.
        """
        vectors = codebook - codebook.mean(0)
        d = min(*vectors.shape, self.embedding.weight.shape[1], self.out.weight.shape[1] // 2)
        if d < vectors.shape[1]:
            vectors = vectors @ torch.linalg.svd(vectors, full_matrices=False).Vh[:d].T  # its principal components
        deviation = vectors.std(0)
        vectors = vectors / deviation.clamp(min=_NOTHING * deviation.amax())
        self.embedding.weight[: self.codes, :d] = vectors
        self.embedding.weight[self.codes] = 0  # what is unknown
        signed = torch.cat([vectors, -vectors], dim=1)  # activations are not negative
        self.out.weight.mul_(_OWN)
        self.out.weight[:, : 2 * d, 0, 0] = _ALIKE * signed

    def layers(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """The layers of a pass, as `product` takes them."""
        layers = [self.first[number], self.middle, self.hidden, self.out]
        return [layer.matrix() for layer in layers if layer is not None]

    def forward(self, number: int, context: Tensor) -> Tensor:
        """int64 (M, CONTEXT) of a pass -> (M, K), integers, in units of 1/16 bit."""
        return scored(context, self.embedding.rows(), self.layers(number))


def scored(context: Tensor, rows: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Scores, (M, K), of contexts, (M, CONTEXT), by the embedding's rows, (K + 1, C), and layers as `product` takes them."""
    a = F.embedding(context, rows).flatten(1)  # M CONTEXT*C
    *inner, last = layers
    for layer in inner:
        a = rectified(product(a, *layer))
    return product(a, *last)


def below_best(scores: Tensor) -> Tensor:
    """How many units every score is below the best of its row, as far as shares tell them apart: (M, K)."""
    return (scores.amax(1, keepdim=True) - scores).clamp_(max=len(_SHARES) - 1)


def shares(below: Tensor) -> Tensor:
    """floor(2^(20 - d/16)) of d units below the best, as `below_best` gives them: (M, K), integers in float64."""
    units = below.int()
    return torch.index_select(_SHARES, 0, units.flatten()).view_as(units)


class IndexModel:
    """The released model: codes and decodes the indices of a picture, on the CPU whatever becomes of the codec.

    In float32: its layers are matrix products whose partial sums float32 holds exactly, in any order.
    """

    def __init__(self, network: IndexNetwork):
        self.network = network = copy.deepcopy(network).float().cpu().eval().requires_grad_(False)
        self._rows, (_, *shared) = network.embedding.rows(), network.layers(0)
        self._layers = [(first.matrix(), *shared) for first in network.first]

    def scores(self, number: int, context: Tensor) -> Tensor:
        """What the network gives, (M, CONTEXT) of a pass -> (M, K), from integers that are made once."""
        return scored(context, self._rows, self._layers[number])

    def choose(self, z: Tensor, codebook: Tensor, weight: float) -> tuple[np.ndarray, bytes]:
        """Indices for little distortion and rate together, pass after pass: argmin_j |z - v_j|^2 + weight bits(j), what is
        chosen before being the context (entropy-constrained VQ, Chou et al. 1989, with a table for every position).

        Args:
            z: d_q x h x w. codebook: (K, d_q). weight: squared distance that a bit may cost, from 0.
        Returns:
            int64 (h, w), and their section as `encode` gives it, from scores that are known already.
        """
        z, codebook = z.permute(1, 2, 0).float().cpu(), codebook.float().cpu()  # h w d_q
        grid, k = self._unknown(*z.shape[:2])
        encoder = SectionEncoder()
        for number, rows, columns in parts(*k.shape, self.network.codes):
            below = below_best(self._scores_at(grid, number, rows, columns))
            # Beside what all codes of a position cost.
            cost = distances(z[rows, columns], codebook) + weight * (below / ACTIVATION_UNIT)
            k[rows, columns] = cost.argmin(1).numpy()
            encoder.add(k[rows, columns], own_tables(shares(below).numpy()))
        return k.astype(np.int64), encoder.close()

    def _unknown(self, h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
        """A bordered grid whose indices are to be found, and the view of these."""
        grid = bordered(np.full((h, w), self.network.codes), self.network.codes)
        return grid, grid[_REACH:-_REACH, _REACH:-_REACH]

    def encode(self, k: np.ndarray) -> bytes:
        """The section of indices (h, w) in [0, K)."""
        encoder = SectionEncoder()
        for symbols, masses, _ in self._coded(k):
            encoder.add(symbols, masses)
        return encoder.close()

    def bits(self, k: np.ndarray) -> np.ndarray:
        """Ideal cost of every index of (h, w): float64 (h, w)."""
        bits = np.empty(k.shape)
        for symbols, masses, at in self._coded(k):
            bits[at] = own_bits(symbols, masses)
        return bits

    def _coded(self, k: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, tuple]]:
        """Indices, their tables and where they are, in the file's order."""
        grid = bordered(k, self.network.codes)
        for number, rows, columns in parts(*k.shape, self.network.codes):
            yield k[rows, columns], self.masses(grid, number, rows, columns), (rows, columns)

    def decode(self, section: bytes, h: int, w: int) -> np.ndarray:
        """Inverse of `encode`: int64 (h, w). Accepts exactly what the encoder writes.

        Raises:
            BitstreamError: a section that no encoder writes for a picture of this size.
        """
        decoder = SectionDecoder(section, "base")
        grid, k = self._unknown(h, w)
        for number, rows, columns in parts(h, w, self.network.codes):
            k[rows, columns] = decoder.take_own(self.masses(grid, number, rows, columns))
        decoder.close()
        return k.astype(np.int64)

    @torch.inference_mode()
    def _scores_at(self, grid: np.ndarray, number: int, rows: np.ndarray, columns: np.ndarray) -> Tensor:
        context = torch.from_numpy(contexts(grid, number, rows, columns, self.network.codes).astype(np.int64))
        with torch.autocast("cpu", enabled=False):
            return self.scores(number, context)

    def masses(self, grid: np.ndarray, number: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Tables (M, K) of positions of a pass, for the coder, given a grid with the indices of earlier passes."""
        return own_tables(shares(below_best(self._scores_at(grid, number, rows, columns))).numpy())
