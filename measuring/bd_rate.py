"""BD-rate: how many more bits per pixel a codec takes than another at equal scores (Bjontegaard, VCEG-M33, 2001)."""

from collections.abc import Sequence

import numpy as np

from utils.errors import DiffoError

Curve = Sequence[tuple[float, float]]
DOUBTFUL = 0.75  # share of the scores of two curves, below which their common ones say little of them


def bd_rate(anchor: Curve, other: Curve, lower_is_better: bool = False) -> float:
    """Percent of bits per pixel that `other` takes more than `anchor` (negative: less), mean over their common scores.

    The mean is of log rate, between curves through all points (piecewise cubic Hermite, as JVET's sheets have it), by
    the package `bjontegaard`.

    Args:
        anchor, other: (bits per pixel, score) of each point, in any order.
    Raises:
        DiffoError: a curve has under two points, is not finite, or does not get better with every step of its rate;
            or no score is within both.
    """
    import bjontegaard  # here, because it imports matplotlib

    anchor_rates, anchor_scores = _rising(anchor, "the anchor's curve", lower_is_better)
    rates, scores = _rising(other, "the curve", lower_is_better)
    if min(anchor_scores[-1], scores[-1]) <= max(anchor_scores[0], scores[0]):
        raise DiffoError("no BD-rate: the two curves have no score in common; code at rates that are closer")
    points = anchor_rates, anchor_scores, rates, scores
    return float(bjontegaard.bd_rate(*points, method="pchip", require_matching_points=False, min_overlap=0))


def overlap(anchor: Curve, other: Curve) -> float:
    """Share of the scores of both curves together that lie within both, 0..1: under DOUBTFUL a BD-rate is."""
    (low, high), (other_low, other_high) = ((min(s), max(s)) for s in ([s for _, s in c] for c in (anchor, other)))
    return max(0.0, min(high, other_high) - max(low, other_low)) / (max(high, other_high) - min(low, other_low))


def _rising(curve: Curve, name: str, lower_is_better: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rates, and scores of which more is better, both strictly rising."""
    rates, scores = np.array(sorted(curve), dtype=float).reshape(-1, 2).T
    scores = -scores if lower_is_better else scores
    if len(rates) < 2:
        raise DiffoError(f"no BD-rate: {name} has {len(rates)} of the two points or more that it needs")
    if not (np.isfinite([rates, scores]).all() and rates[0] > 0 and (np.diff([rates, scores]) > 0).all()):
        raise DiffoError(f"no BD-rate: {name} does not get better with every step of its rate")
    return rates, scores
