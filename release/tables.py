"""Counts on pictures -> the integer tables of a release. Built once; loading builds none."""

import math
import sys
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from datapipe.draws import LEVELS, generator
from datapipe.pictures import Batch, Pictures, stream
from models.codec import Codec
from models.entropy_coding import centred_table, frequency_table, table_cost_bits
from models.residual_hyperprior import HYPER_REACH, LEVEL_CODES, SYMBOL_REACH, ResidualTables, Symbols, node_of
from models.residual_networks import SCALE_MIN, SCALE_STEP, SCALES, ResidualParams
from training.config import TrainConfig
from utils.precision import full_precision

BATCH = 8  # crops coded at once
PRIOR_WEIGHT = 64  # symbols that the Gaussian counts for, beside those that were seen
_UNIT = 1024  # counts are multiplied by it, so that the prior's fractions survive as integers


@dataclass
class Counts:
    """How often each symbol was coded, int64.

    Attributes:
        base: indices, (K,). hyper: n_z by level and channel, (L, C_z, 31). symbols: n by table index, (SCALES, 63).
        These two are None without a residual codec. crops: the indices themselves, int16 (h, w) each. coded: symbols of
        every crop at one of the levels, as small integers.
    """

    base: np.ndarray
    hyper: np.ndarray | None = None
    symbols: np.ndarray | None = None
    crops: list[np.ndarray] = field(default_factory=list)
    coded: list[Symbols] = field(default_factory=list)

    @classmethod
    def none(cls, codec: Codec) -> "Counts":
        params = codec.params
        shapes = [(params.vq_base.codebook_size,)]
        if p := params.residual:
            shapes += [(p.levels, p.hyper_channels, 2 * HYPER_REACH + 1), (SCALES, 2 * SYMBOL_REACH + 1)]
        return cls(*(np.zeros(shape, dtype=np.int64) for shape in shapes))

    def add(self, found: Symbols, node: int) -> None:
        channels = np.arange(len(found.hyper))[:, None, None]
        np.add.at(self.hyper[node], (channels, found.hyper + HYPER_REACH), 1)
        np.add.at(self.symbols, (found.index, found.residual + SYMBOL_REACH), 1)

    def install(self, codec: Codec) -> dict[str, float]:
        """Give the codec the tables that follow from the counts; returns what a release says of them."""
        codec.base_table = frequency_table(self.base + 1)  # training pictures need not show them all
        if codec.residual is not None:
            codec.residual.freeze(self.residual_tables())
        bits = table_cost_bits(np.repeat(np.arange(len(self.base)), self.base), codec.base_table)
        return {
            "counted_indices": int(self.base.sum()),
            "used_indices": int((self.base > 0).sum()),
            "bits_per_index": round(bits / self.base.sum(), 4),
        }

    def residual_tables(self) -> ResidualTables:
        """Hyper symbols start with one count up to one beyond the largest seen, the others with their Gaussian."""
        hyper = np.stack([np.stack([centred_table(_with_margin(row)) for row in node]) for node in self.hyper])
        return ResidualTables(hyper, np.stack([centred_table(row) for row in with_prior(self.symbols)]))


def with_prior(counts: np.ndarray, mean: float = 0.0) -> np.ndarray:
    """Counts of n by index, (SCALES, 63), with those that a Gaussian of this mean, in sigmas, has beforehand: int64, scaled."""
    return counts * _UNIT + np.rint(PRIOR_WEIGHT * _UNIT * gaussian_pmf(mean)).astype(np.int64)


def gaussian_pmf(mean: float = 0.0) -> np.ndarray:
    """Probability of n = -31..31 for every sigma of the tables: N(mean sigma, sigma^2) over [n - 1/2, n + 1/2)."""
    sigma = SCALE_MIN * SCALE_STEP ** np.arange(SCALES)
    edges = (np.arange(2 * SYMBOL_REACH + 2) - SYMBOL_REACH - 0.5) / sigma[:, None] - mean
    return np.diff(0.5 * (1 + np.vectorize(math.erf)(edges / math.sqrt(2))), axis=1)


def _with_margin(counts: np.ndarray) -> np.ndarray:
    distance = np.abs(np.arange(len(counts)) - len(counts) // 2)
    return counts + (distance <= 1 + distance[counts > 0].max(initial=0))


@torch.inference_mode()
@full_precision()
def count(codec: Codec, config: TrainConfig, crops: int, batch: int = BATCH) -> Counts:
    """Code crops of the configuration's training pictures on the codec's device, at every level, and count."""
    pictures = Pictures(config.data, config.codec.crop_size, config.seed)
    counts = Counts.none(codec)
    with closing(stream(pictures, batch, rank=0, world=1, first=0)) as batches:
        for start in tqdm(range(0, crops, batch), desc="counting symbols"):
            _count_crops(codec, next(batches)[: crops - start], config.seed, counts)
    for line in pictures.source.unreadable_lines():
        print(line, file=sys.stderr)
    return counts


def _count_crops(codec: Codec, crops: Batch, seed: int, counts: Counts) -> None:
    x = codec.to_latent(crops.image.to(codec.device))
    k = codec.vq_base.indices(x)
    counts.crops.extend(k.cpu().numpy().astype(np.int16))
    counts.base += np.bincount(k.flatten().cpu().numpy(), minlength=len(counts.base))
    if codec.residual is None:
        return
    y = codec.vq_base.reconstruct(codec.vq_base.rows(k))
    s = codec.residual.analysis(x - y, y)
    for i, position in enumerate(crops.position.tolist()):
        one = slice(i, i + 1)
        for node, code in enumerate(_codes(codec.residual.params, seed, position)):
            found = codec.residual.symbols(s[one], y[one], k[one], code)
            counts.add(found, node)
            if node == position % codec.residual.params.levels:
                counts.coded.append(Symbols(found.hyper, found.residual.astype(np.int8), found.index))


def _codes(params: ResidualParams, seed: int, position: int) -> list[int]:
    """A file's byte for every node of the hyper tables, drawn among those that it serves."""
    nodes = np.array([node_of(code, params) for code in range(1, LEVEL_CODES + 1)])
    random = generator(seed, LEVELS, position)
    return [1 + int(random.choice(np.flatnonzero(nodes == node))) for node in range(params.levels)]
