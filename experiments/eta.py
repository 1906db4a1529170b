"""Rate-aware noise modulation, fitted: eta is swept at several rates, and c of eta = clip(c / B) follows (Fig. 5).

The metric decides what c means. A fidelity metric punishes every invented detail, so it may prefer the least noise at
every rate; c is then not identifiable, and the default stays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from measuring.metrics import score_with_pyiqa, unavailable
from models.codec import Codec
from models.diffusion import RateParams
from models.records import Sampling
from utils.images import read_image

PERCEPTUAL, WITHOUT_WEIGHTS = "lpips-vgg", "nlpd"
LOWER_IS_BETTER = ("lpips-vgg", "lpips-alex", "dists", "nlpd", "gmsd")
FINEST_C = 400  # values of c that are tried, geometric over the sweep's range


@dataclass(frozen=True)
class Sweep:
    """Scores of one set of pictures, made to be minimised.

    Attributes:
        etas: swept noise levels, rising, (E,). rates: mean B_eta at every level, bits per pixel, (R,).
        scores: mean over the pictures, (R, E); a metric where more is better is negated.
    """

    etas: np.ndarray
    rates: np.ndarray
    scores: np.ndarray

    def at(self, etas: Sequence[float]) -> np.ndarray:
        """Score at one eta per rate, interpolated in log eta: (R,)."""
        return np.array(
            [np.interp(math.log(e), np.log(self.etas), row) for e, row in zip(etas, self.scores, strict=True)]
        )

    def of_rule(self, rate: RateParams) -> float:
        """Mean score over the rates of eta = clip(c / B)."""
        return float(self.at([rate.eta(b) for b in self.rates]).mean())

    def of_constants(self) -> np.ndarray:
        """Mean score over the rates of every constant eta: (E,)."""
        return self.scores.mean(0)

    @property
    def best(self) -> np.ndarray:
        """Index of the best eta at every rate: (R,)."""
        return self.scores.argmin(1)

    @property
    def identifies_c(self) -> bool:
        """Whether most rates have their best eta inside the sweep rather than at its ends."""
        inside = (self.best > 0) & (self.best < len(self.etas) - 1)
        return bool(inside.mean() > 0.5)


def default_metric() -> tuple[str, str | None]:
    """The metric to fit with, and why it is not the perceptual one, if it is not."""
    reason = unavailable(PERCEPTUAL)
    return (PERCEPTUAL, None) if reason is None else (WITHOUT_WEIGHTS, reason)


@torch.inference_mode()
def sweep(codec: Codec, pictures: Sequence[Path], levels: Sequence[int], etas: Sequence[float], metric: str) -> Sweep:
    """Decode every picture at every level with every eta, and score it.

    Args:
        levels: bytes as in the file, 0 for the base alone. metric: a key of `measuring.metrics.METRICS`.
    """
    sign = 1 if metric in LOWER_IS_BETTER else -1
    scores, rates = np.zeros((len(levels), len(etas))), np.zeros(len(levels))
    for path in tqdm(pictures, desc="sweeping eta", unit="picture"):
        image = read_image(path)
        analysed = codec.analyse(image)
        for row, level in enumerate(levels):
            contents = codec.read(codec.write(analysed, level))
            rates[row] += contents.file.section_bpp / len(pictures)
            decoded = (codec.render(contents, Sampling(eta=eta)).image for eta in etas)
            values = score_with_pyiqa([metric], ((image, one) for one in decoded), codec.device)
            scores[row] += sign * np.array([value[metric] for value in values]) / len(pictures)
    return Sweep(np.asarray(etas), rates, scores)


def fit(found: Sweep, default: RateParams) -> RateParams:
    """The c with the least mean score over the rates; the default where the sweep does not identify one."""
    if not found.identifies_c:
        return default
    low, high = found.etas[0] * found.rates.min(), found.etas[-1] * found.rates.max()
    tried = [RateParams(float(c), default.eta_min, default.eta_max) for c in np.geomspace(low, high, FINEST_C)]
    return min(tried, key=found.of_rule)
