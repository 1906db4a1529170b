"""The energy score: a loss for which the denoiser's noise is of use, by hand and in a step of stage `codec`."""

import itertools
from dataclasses import replace

import pytest
import torch

from models.records import Draws
from tests.stages import batch_of, new_stage
from training.perceptual_networks import EnergyScore
from training.stage_config import CodecStageParams

OPTIONS = ("codec.distortion_weight=0", "codec.perceptual={}", "codec.energy_weight=0.5")


def point(*values: float) -> torch.Tensor:
    """One position of so many channels."""
    return torch.tensor(values).view(1, -1, 1, 1)


def test_the_score_of_two_draws_by_hand():
    """Two draws at a distance of 1 from the original and sqrt(2) from each other; with equal draws, the distance."""
    score = EnergyScore.of(point(1.0, 0.0), point(0.0, 1.0), point(0.0, 0.0))
    assert score.item() == pytest.approx((1 + 1 - 2**0.5) / 2, rel=1e-5)
    assert EnergyScore.of(point(3.0, 4.0), point(3.0, 4.0), point(0.0, 0.0)).item() == pytest.approx(5, rel=1e-4)
    many = EnergyScore.of(*(torch.cat([point(a, 0.0), point(b, 0.0)], dim=3) for a, b in ((1, 2), (2, 2), (0, 0))))
    assert many.item() == pytest.approx((1.5 + 2 - 0.5) / 2, rel=1e-4)  # of means over positions


def test_draws_like_the_originals_beat_the_middle_and_the_extremes():
    """Originals at -1 and 1, as often: expected scores over all combinations."""

    def expected(draws: tuple[float, ...]) -> float:
        scores = [EnergyScore.of(*map(point, triple)).item() for triple in itertools.product(draws, draws, (-1.0, 1.0))]
        return sum(scores) / len(scores)

    assert expected((-1.0, 1.0)) == pytest.approx(0.5, abs=1e-3)
    assert expected((0.0,)) == pytest.approx(1, abs=1e-3) == expected((1.0,))
    assert expected((-3.0, 3.0)) > 1


def test_the_second_picture_has_the_noise_of_the_sample_before():
    stage = new_stage("codec", *OPTIONS, residual=True)
    torch.nn.init.constant_(stage.codec.unet.out[-1].weight, 0.05)
    batch = batch_of(stage, 3)
    with torch.no_grad():
        out = stage.forward(stage.network, batch)
        draws = Draws(**batch.draws)
        again = stage.codec(batch.image, replace(draws, noise=draws.noise[[2, 0, 1]]))
    torch.testing.assert_close(out.other, again.image)
    assert not torch.allclose(out.other, out.image)


def test_the_stage_pays_for_it_and_validation_takes_the_distance():
    stage = new_stage("codec", *OPTIONS)
    batch = batch_of(stage)
    with torch.no_grad():
        out = stage.forward(stage.network, batch)
        terms = stage.losses(out, batch)
        one = stage.losses(replace(out, other=None), batch)
        twice = stage.energy(out.image, out.image, batch.image)
    assert terms["energy"].item() == stage.energy(out.image, out.other, batch.image).item()
    assert terms["loss"].item() == pytest.approx((0.5 * terms["energy"] + 0.25 * terms["commitment"]).item(), rel=1e-6)
    assert one["energy"].item() == twice.item()


def test_other_noise_needs_another_sample():
    with pytest.raises(ValueError, match="energy_weight: batch_size and microbatch are at least 2"):
        CodecStageParams(energy_weight=1.0, batch_size=4, microbatch=1)
    with pytest.raises(ValueError, match="energy_weight"):
        CodecStageParams(energy_weight=1.0, batch_size=1)
