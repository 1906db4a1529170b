"""The statistics of some thousand draws, and what a draw depends on: the seed and the position alone."""

import functools
import itertools
import math

import pytest
import torch

from datapipe.draws import CROP, DRAWS, EPOCH, LEVELS, REVIVAL, DrawParams, draw, draw_batch, generator

COUNT = 4000
LATENT = (2, 3, 4)


@functools.cache
def drawn(seed: int = 0, count: int = COUNT, **params) -> dict[str, torch.Tensor]:
    return draw_batch(DrawParams(**dict(latent=LATENT, steps=4) | params), seed, range(count))


def assert_share(found: torch.Tensor, probability: float) -> None:
    """Within four standard deviations of a binomial."""
    deviation = math.sqrt(probability * (1 - probability) / len(found))
    assert abs(found.double().mean().item() - probability) <= 4 * deviation


def assert_mean(found: torch.Tensor, mean: float, variance: float) -> None:
    """Within four standard deviations of the mean of independent numbers."""
    assert abs(found.double().mean().item() - mean) < 4 * math.sqrt(variance / found.numel())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_all_steps_are_alike_without_a_share(steps):
    t = drawn(steps=steps)["t"]
    assert t.dtype == torch.int64 and set(t.tolist()) == set(range(steps))
    for step in range(steps):
        assert_share(t == step, 1 / steps)


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_the_last_step_has_its_share_and_the_others_the_rest(share):
    t = drawn(last_step_share=share)["t"]
    assert_share(t == 3, share)
    for step in range(3):
        assert_share(t == step, (1 - share) / 3)
    assert set(drawn(steps=1, count=50, last_step_share=0.5)["t"].tolist()) == {0}


def test_the_decoders_input_is_for_the_last_step_and_only_if_asked():
    asked, plain = drawn(decoder_input=True), drawn()
    assert asked["decoder_input"].dtype == torch.bool and torch.equal(asked["decoder_input"], asked["t"] == 3)
    assert 0 < asked["decoder_input"].sum() < COUNT and not plain["decoder_input"].any()


def test_the_spread_is_log_uniform_from_a_half_to_two():
    octaves = drawn()["spread"].log2()
    assert octaves.dtype == torch.float64 and -1 <= octaves.min() < -0.99 and 0.99 < octaves.max() <= 1
    assert_mean(octaves, 0, 1 / 3)
    assert_mean(octaves.square(), 1 / 3, 1 / 5 - 1 / 9)


def test_the_noise_is_standard_normal():
    noise = drawn()["noise"]
    assert noise.shape == (COUNT, *LATENT) and noise.dtype == torch.float32
    assert_mean(noise, 0, 1)
    assert_mean(noise.square(), 1, 2)
    assert_mean(noise**4, 3, 96)
    for element in noise.flatten(1).T:  # each by itself, and no two alike
        assert_mean(element, 0, 1)
    together = torch.corrcoef(noise.flatten(1).T)
    assert (together - torch.eye(24)).abs().max() < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_the_level_is_zero_with_its_share_and_else_uniform(share):
    """From 1 to L = 5: mean 3, variance 16 / 12."""
    level = drawn(levels=5, base_only_share=share)["level"]
    assert level.dtype == torch.float64
    assert_share(level == 0, share)
    if len(sent := level[level != 0]):
        assert 1 <= sent.min() < 1.05 and 4.95 < sent.max() <= 5
        assert_mean(sent, 3, 16 / 12)
        assert_mean((sent - 3).square(), 16 / 12, 16 * (1 / 5 - 1 / 9))


def test_the_quantisation_noise_is_uniform_and_centred():
    uniform = drawn(levels=3, uniforms=7)["uniform"]
    assert uniform.shape == (COUNT, 7) and uniform.dtype == torch.float32
    assert -0.5 <= uniform.min() < -0.499 and 0.499 < uniform.max() < 0.5
    assert_mean(uniform, 0, 1 / 12)
    assert_mean(uniform.square(), 1 / 12, 1 / 80 - 1 / 144)
    for element in uniform.T:
        assert_mean(element, 0, 1 / 12)


def test_a_draw_is_a_function_of_seed_and_position():
    params = DrawParams(LATENT, 1000, levels=9, uniforms=3)
    torch.manual_seed(1)
    first = draw(params, 3, 5)
    assert first["t"] == generator(3, DRAWS, 5).integers(0, 1000)  # the random stream of draws
    torch.manual_seed(2)
    later = draw_batch(params, 3, [8, 5, 2])
    for name, number in first.items():
        assert torch.equal(number, later[name][1]), name
    names = {"t", "spread", "noise", "level", "uniform"}
    for seed, position in ((4, 5), (3, 6), (5, 3)):
        other = draw(params, seed, position)
        assert all(not torch.equal(first[name], other[name]) for name in names)


def test_numbers_of_a_sample_do_not_follow_from_each_other():
    """The correlation of independent numbers is within four deviations of 1 / sqrt(N)."""
    found = drawn(last_step_share=0.5, levels=5, uniforms=1, base_only_share=0.5)
    columns = [
        found["t"] == 3,
        found["spread"].log2(),
        found["level"],
        found["uniform"][:, 0],
        found["noise"][:, 0, 0, 0],
    ]
    together = torch.corrcoef(torch.stack([column.double() for column in columns]))
    assert (together - torch.eye(5)).abs().max() < 4 / math.sqrt(COUNT)
    following = torch.corrcoef(torch.stack([columns[1][:-1], columns[1][1:]]))  # nor do those of neighbours
    assert abs(following[0, 1]) < 4 / math.sqrt(COUNT)


def test_random_streams_are_independent():
    purposes = (EPOCH, CROP, DRAWS, REVIVAL, LEVELS)
    keys = list(itertools.product(range(3), purposes, range(3)))
    assert len({generator(*key).random() for key in keys}) == 45
    assert generator(2, CROP, 1).random() == generator(2, CROP, 1).random()
