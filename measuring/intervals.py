"""Means over pictures with their 95 % intervals, by the bootstrap (Efron 1979, percentile intervals)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
AT_ONCE = 100  # of them: memory for thousands of pictures
PERCENTILES = (2.5, 97.5)
LOW, HIGH = "_low", "_high"  # end the names of the columns that hold a mean's ends


@dataclass(frozen=True)
class Interval:
    """A mean, or another estimate, between the ends of its 95 % interval; None where there is no interval."""

    mean: float
    low: float | None = None
    high: float | None = None


def bootstrap(values: Sequence[float | None], seed: int = 0) -> Interval | None:
    """The mean over pictures: as many are drawn with replacement, again and again, and their means are counted.

    Args:
        values: a score of every picture of a row. seed: of the draws; the same values give the same interval.
    Returns:
        None if a value is missing or not finite: a mean is over all pictures of its row or it is not there. One
        picture has a mean without an interval.
    """
    if not values or any(value is None or not math.isfinite(value) for value in values):
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean)
    rng, scores = np.random.default_rng(seed), np.asarray(values, dtype=float)
    drawn = (rng.integers(len(scores), size=(AT_ONCE, len(scores))) for _ in range(RESAMPLES // AT_ONCE))
    low, high = np.percentile(np.concatenate([scores[each].mean(1) for each in drawn]), PERCENTILES)
    return Interval(mean, float(low), float(high))


def paired(a: Sequence[float | None], b: Sequence[float | None]) -> Interval | None:
    """The mean of a - b over the same pictures, in the same order, as `bootstrap`: narrower than two means would say.

    Raises ValueError if they are not as many.
    """
    both = list(zip(a, b, strict=True))
    return None if any(None in pair for pair in both) else bootstrap([x - y for x, y in both])
