"""Means over pictures with bootstrap intervals, beside SciPy's and by hand."""

import math

import numpy as np
import pytest

from measuring import intervals
from measuring.intervals import Interval, bootstrap, paired

VALUES = [31.2, 28.9, 33.4, 30.1, 29.5, 35.0, 27.7, 32.8]


def test_an_interval_is_the_bootstrap_of_the_mean():
    from scipy.stats import bootstrap as by_scipy

    found = bootstrap(VALUES)
    rng = np.random.default_rng(1)
    other = by_scipy((VALUES,), np.mean, n_resamples=20_000, method="percentile", rng=rng).confidence_interval
    assert found.mean == pytest.approx(sum(VALUES) / 8)
    assert (found.low, found.high) == pytest.approx(other, abs=0.05)
    assert found == bootstrap(VALUES) and bootstrap(VALUES, seed=1).low == pytest.approx(found.low, abs=0.1)
    assert bootstrap(VALUES, seed=1) != found


def test_ends_of_two_pictures_are_the_pictures():
    """Two of two, with replacement: both are the first in a quarter of the draws, more than the 2.5 % beyond an end."""
    assert bootstrap([1.0, 3.0]) == Interval(2.0, 1.0, 3.0)


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    found = bootstrap(VALUES)
    monkeypatch.setattr(intervals, "AT_ONCE", intervals.RESAMPLES)
    assert bootstrap(VALUES) == found


def test_a_constant_has_no_width_and_one_picture_no_interval():
    assert bootstrap([0.5] * 24) == Interval(0.5, 0.5, 0.5)
    assert bootstrap([7.0]) == Interval(7.0)


@pytest.mark.parametrize("missing", [None, math.inf, math.nan])
def test_a_mean_is_over_all_pictures_or_not_there(missing):
    assert bootstrap([1.0, missing, 2.0]) is None
    assert paired([1.0, missing], [1.0, 2.0]) is None and paired([1.0, 2.0], [1.0, missing]) is None
    assert bootstrap([]) is None


def test_paired_differences_do_not_see_how_pictures_differ():
    better = [value + gain for value, gain in zip(VALUES, (0.4, 0.5, 0.6, 0.5) * 2, strict=True)]
    gain, apart = paired(better, VALUES), bootstrap(VALUES)
    assert gain.mean == pytest.approx(0.5) and 0.4 < gain.low < 0.5 < gain.high < 0.6
    assert apart.high - apart.low > 1
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])
