"""The decoder's noise: Philox against the published vectors, its moments, and what it depends on."""

import itertools
import math

import pytest
import torch

from models.noise import normal, philox, portable_noise

# Known answers of Random123's Philox4x32-10: counter, key, words.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_philox_gives_the_published_words(counter, key, expected):
    found = philox([torch.tensor([word]) for word in words(counter)], tuple(words(key)))
    assert [word.item() for word in found] == words(expected)


def test_normals_by_hand():
    """Channels 4n to 4n + 3 are the pairs that Box and Muller make of the words of counter (row, column, n, step).

    The first word of this seed is small: there, half a step of 2^-24 counts.
    """
    words = philox([torch.tensor(place) for place in (2, 3, 1, 5)], (3969, 0))
    uniform = [((word.item() >> 8) + 0.5) / 2**24 for word in words]
    expected = [
        math.sqrt(-2 * math.log(u)) * wave(2 * math.pi * v)
        for u, v in (uniform[:2], uniform[2:])
        for wave in (math.cos, math.sin)
    ]
    assert normal(3969, 5, (8, 3, 4))[0, 4:, 2, 3].tolist() == pytest.approx(expected, abs=4e-6)


def test_draws_follow_each_other_in_steps_from_0():
    like = torch.zeros(1, 6, 2, 3)
    for step, noise in enumerate(itertools.islice(portable_noise(5, like), 3)):
        assert torch.equal(noise, normal(5, step, (6, 2, 3)))


def test_standard_normal_moments():
    """A million numbers: each moment within four of its standard errors; channels and neighbours are not correlated."""
    x = normal(7, 0, (16, 250, 250))[0].double()
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert abs((x[0] * x[1]).mean()) < 4 / 250 and abs((x[:, :, 1:] * x[:, :, :-1]).mean()) < 4 / math.sqrt(n)


def test_a_number_depends_on_its_own_place_alone():
    whole = normal(5, 1, (6, 9, 8))
    assert torch.equal(whole[:, :, :4, :5], normal(5, 1, (6, 4, 5)))
    assert torch.equal(whole[:, :3], normal(5, 1, (3, 9, 8)))
    assert not torch.equal(whole, normal(5, 0, (6, 9, 8))) and not torch.equal(whole, normal(6, 1, (6, 9, 8)))
    assert torch.equal(normal(2**32 - 1, 0, (4, 2, 2)), normal(2**32 - 1, 0, (4, 2, 2)))
