import pytest

from experiments.rates import bd_rates
from measuring.bd_rate import bd_rate, overlap
from utils.errors import DiffoError

ANCHOR = [(0.03, 22.0), (0.06, 24.0), (0.12, 26.5), (0.24, 29.0)]


def scaled(curve, factor):
    return [(bpp * factor, score) for bpp, score in curve]


def test_twice_the_rate_at_every_score_is_100_percent_and_half_of_it_minus_50():
    assert bd_rate(ANCHOR, scaled(ANCHOR, 2)) == pytest.approx(100)
    assert bd_rate(ANCHOR, scaled(ANCHOR, 0.5)) == pytest.approx(-50)
    assert bd_rate(ANCHOR, ANCHOR[::-1]) == pytest.approx(0)


def test_only_common_scores_count_and_their_mean_is_of_log_rate():
    """Lines in log rate, from 0 % more at a score of 20 to 300 % at 30: on average a factor of 2, so 100 %."""
    anchor, other = [(0.1, 20), (0.2, 30)], [(0.1, 20), (0.8, 30)]
    assert bd_rate(anchor, other) == pytest.approx(100)
    # From 25 to 30 the factor goes from 2 to 4: its mean is 2^1.5.
    assert bd_rate([(0.1 * 2**0.5, 25), (0.2, 30)], other) == pytest.approx(100 * (2**1.5 - 1))
    assert overlap([(0.1, 25), (0.2, 30)], [(0.1, 20), (0.8, 28)]) == pytest.approx(0.3)
    assert overlap([(0.1, 1), (0.2, 2)], [(0.1, 3), (0.8, 4)]) == 0


def test_a_bd_rate_over_few_common_scores_is_there_and_called_doubtful():
    """Of scores from 20 to 30, those of 25 to 28 are common: 30 %."""
    curves = {
        "anchor": [(0.1, 25.0), (0.2, 30.0)],
        "few": [(0.1, 20.0), (0.8, 28.0)],
        "all": [(0.2, 25.0), (0.4, 30.0)],
    }
    means = [{"codec": codec, "bpp": bpp, "psnr": psnr} for codec, curve in curves.items() for bpp, psnr in curve]
    found, reasons = bd_rates(means, "anchor")
    assert found["all"]["bd-rate-psnr"] == pytest.approx(100) and found["few"]["bd-rate-psnr"] > 0
    assert list(reasons) == ["few, PSNR"] and "30 %" in reasons["few, PSNR"]


def test_a_score_of_which_less_is_better_has_the_same_sign():
    lpips = [(bpp, 50 - score) for bpp, score in ANCHOR]
    assert bd_rate(lpips, scaled(lpips, 2), lower_is_better=True) == pytest.approx(100)


@pytest.mark.parametrize(
    "other, told",
    [
        ([(0.5, 30.0), (1.0, 33.0)], "no score in common"),
        ([(0.5, 29.0), (1.0, 33.0)], "no score in common"),
        ([(0.03, 22.0), (0.06, 25.0), (0.12, 24.0)], "does not get better with every step"),
        ([(0.03, 22.0), (0.03, 23.0), (0.12, 24.0)], "does not get better with every step"),
        ([(0.03, float("nan")), (0.12, 24.0)], "does not get better with every step"),
        ([(0.03, 22.0)], "has 1 of the two points"),
        ([], "has 0 of the two points"),
    ],
)
def test_curves_without_a_bd_rate_are_refused_in_one_line(other, told):
    for pair in ((ANCHOR, other), (other, ANCHOR)):
        with pytest.raises(DiffoError, match=told) as refused:
            bd_rate(*pair)
        assert "\n" not in str(refused.value)
