"""The terms of both stages' losses on numbers computed by hand, and what the terms are given."""

import inspect
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lpips
import numpy as np
import pytest
import torch

from datapipe.draws import DrawParams, draw
from datapipe.pictures import Batch
from measuring.weights import VGG16
from models.records import CodecOutput
from models.vq_base import BaseCode
from tests.stages import batch_of, new_stage
from training.codec_stage import Seen
from training.perceptual import Lpips, perceptual_terms
from training.stage import Restored
from training.stage_config import AdversaryParams, CodecStageParams
from utils.errors import ConfigError

RANDOM = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RANDOM.uniform(-1, 1, shape)


class Recorder(torch.nn.Module):
    """A perceptual term that is neither symmetric nor zero at equal pictures."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.factor * (2 * image - target).mean() + 3


def recorders() -> dict[str, Recorder]:
    return {"lpips": Recorder(1.0), "features": Recorder(5.0)}


def perceptual(image: np.ndarray, target: np.ndarray) -> dict[str, float]:
    difference = (2 * image - target).mean()
    return {"lpips": difference + 3, "features": 5 * difference + 3}


def chroma(image: np.ndarray, target: np.ndarray) -> float:
    error = image - target
    return ((error - error.mean(1, keepdims=True)) ** 2).mean()


def as_floats(terms: dict[str, torch.Tensor]) -> dict[str, float]:
    assert all(term.shape == () for term in terms.values())
    return {name: term.item() for name, term in terms.items()}


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_the_loss_of_stage_gt(kind):
    stage = new_stage(
        "gt",
        f"gt.distortion={kind}",
        "gt.distortion_weight=1.5",
        "gt.chroma_weight=0.7",
        "gt.perceptual={lpips: 0.3, features: 0.2}",
        perceptual=recorders(),
    )
    image, target = numbers(2, 3, 2, 3), numbers(2, 3, 2, 3)
    terms = stage.losses(Restored(torch.tensor(image)), Batch(torch.tensor(target), torch.arange(2)))
    error = np.abs(image - target) if kind == "l1" else (image - target) ** 2
    expected = {
        "distortion": error.mean(),
        "chroma": chroma(image, target),
    } | perceptual(image, target)
    factors = {"distortion": 1.5, "lpips": 0.3, "features": 0.2, "chroma": 0.7}
    expected["loss"] = sum(factor * expected[name] for name, factor in factors.items())
    assert as_floats(terms) == pytest.approx(expected, rel=1e-9)


def made_up(levels: list[float], auxiliary: float | None = None) -> tuple[CodecOutput, Batch, dict]:
    """An output of the codec that no network made, the batch it belongs to, and its arrays by name."""
    n = len(levels)
    arrays = {"image": numbers(n, 3, 2, 3), "target": numbers(n, 3, 2, 3), "z": numbers(n, 2, 1, 2)}
    arrays |= {"z_q": numbers(n, 2, 1, 2), "bpp": np.array([0.3, 0.11, 0.23, 0.47, 0.05][:n])}
    t = {name: torch.tensor(array) for name, array in arrays.items()}
    base = BaseCode(t["z"], t["z_q"], torch.zeros(n, 1, 2).long(), torch.zeros(16), torch.zeros(16, 2))
    arrays |= {"x": numbers(n, 1, 1, 2), "x_hat": numbers(n, 1, 1, 2)}
    x, x_hat = torch.tensor(arrays["x"]), torch.tensor(arrays["x_hat"])
    out = CodecOutput(x, x, x_hat, t["image"], base, t["bpp"], None if auxiliary is None else torch.tensor(auxiliary))
    level = torch.tensor(levels, dtype=torch.float64)
    return out, Batch(t["target"], torch.arange(n), {"level": level}), arrays


def test_the_loss_of_stage_codec():
    """L = w_d D + w_p P + w_x |x - x^|^2 + beta C + w_c chroma + mean of lambda_g R; lambda is
    geometric from level 1 to 3, here halved with every half level; `auxiliary` is told and stays outside."""
    stage = new_stage(
        "codec",
        "codec.distortion_weight=0.9",
        "codec.perceptual={lpips: 0.35, features: 0.45}",
        "codec.commitment=0.15",
        "codec.latent_weight=0.55",
        "codec.chroma_weight=0.6",
        "codec.rate_weights=[2.0,0.125]",
        residual=True,
        perceptual=recorders(),
    )
    out, batch, a = made_up([0.0, 1.0, 2.0, 2.5, 3.0], auxiliary=1000.0)
    image, target = a["image"], a["target"]
    expected = {
        "distortion": ((image - target) ** 2).mean(),
        "commitment": ((a["z"] - a["z_q"]) ** 2).mean(),
        "latent": ((a["x"] - a["x_hat"]) ** 2).mean(),
        "chroma": chroma(image, target),
        "rate": (np.array([2.0, 2.0, 0.5, 0.25, 0.125]) * a["bpp"]).mean(),
        "auxiliary": 1000.0,
    } | perceptual(image, target)
    factors = {"distortion": 0.9, "lpips": 0.35, "features": 0.45, "commitment": 0.15, "chroma": 0.6, "rate": 1.0}
    factors["latent"] = 0.55
    expected["loss"] = sum(factor * expected[name] for name, factor in factors.items())
    assert as_floats(stage.losses(out, batch)) == pytest.approx(expected, rel=1e-9)


def test_a_loss_of_the_latent_alone_runs_no_decoder():
    stage = new_stage("codec", "codec.distortion_weight=0", "codec.perceptual={}", "codec.latent_weight=0.5")
    batch = batch_of(stage)
    stage.codec.autoencoder.decoder.forward = None  # a call would fail
    out = stage.forward(stage.network, batch)
    terms = as_floats(stage.losses(out, batch))
    assert out.image is None and stage.kept(out, batch).image is None
    expected = 0.5 * (out.x - out.x_hat).square().mean().item() + 0.25 * terms["commitment"]
    assert set(terms) == {"latent", "commitment", "loss"} and terms["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_codec_stage_that_has_nothing_to_learn_from_is_refused():
    nothing = dict(distortion_weight=0.0, perceptual={})
    with pytest.raises(ValueError, match="latent_weight are all 0"):
        CodecStageParams(**nothing)
    assert CodecStageParams(**nothing, adversary=AdversaryParams(weight=1.0)).decodes
    assert not CodecStageParams(**nothing, latent_weight=1.0).decodes
    with pytest.raises(ValueError, match="train_decoder: D learns from terms of the picture"):
        CodecStageParams(**nothing, latent_weight=1.0, train_decoder=0.1)
    with pytest.raises(ValueError, match="train_encoder: E learns from terms of the picture"):
        CodecStageParams(**nothing, latent_weight=1.0, train_encoder=0.1)


def test_the_codec_stages_loss_without_its_options():
    """The paper's three terms, and its factors, when there is no residual and no chroma."""
    paper = CodecStageParams()
    assert paper.perceptual == {"lpips": 0.2} and paper.chroma_weight == 0 and paper.train_decoder == 0
    stage = new_stage("codec", "codec.perceptual={lpips: 0.2}", perceptual={"lpips": Recorder(1.0)})
    out, batch, _ = made_up([0.0, 0.0])
    terms = as_floats(stage.losses(out, batch))
    assert set(terms) == {"distortion", "lpips", "commitment", "loss"}
    parts = 0.8 * terms["distortion"] + 0.2 * terms["lpips"] + 0.25 * terms["commitment"]
    assert terms["loss"] == pytest.approx(parts, rel=1e-12)


def test_lpips_is_given_signed_pictures(monkeypatch):
    """LPIPS' scaling layer normalises pictures in [-1, 1] to ImageNet's statistics, unless `normalize` maps from [0, 1]."""
    given = {}

    class Fake(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            given.update(options)

        def forward(self, image, target, retPerLayer=False, normalize=False):
            given.update(image=image, target=target, normalize=normalize)
            return torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1, 1)

    mean, scaling = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), lpips.ScalingLayer()
    torch.testing.assert_close(scaling.shift, 2 * mean - 1, rtol=0, atol=1e-6)
    assert inspect.signature(lpips.LPIPS.forward).parameters["normalize"].default is False
    monkeypatch.setattr(lpips, "LPIPS", Fake)
    monkeypatch.setattr(type(VGG16), "path", Path(__file__))  # there
    image, target = (torch.tensor(numbers(3, 3, 16, 16)).float() for _ in range(2))
    assert Lpips()(image, target).item() == 3.0  # a mean over the batch
    assert given["net"] == "vgg" and given["pretrained"] and not given["pnet_rand"]
    assert torch.equal(given["image"], image) and torch.equal(given["target"], target) and not given["normalize"]


def test_rates_are_logged_by_level():
    """Of the nearest level, over micro-batches: the base's 4 bits a cell of 256 pixels, and the residual's mean."""
    stage = new_stage("codec", residual=True)
    levels, rates = ([0.0, 2.6], [3.0, 1.2]), ([0.0, 0.5], [0.25, 0.125])
    nothing = torch.zeros(0)
    seen = [
        Seen(nothing, nothing, nothing, nothing, torch.tensor(level).double(), torch.tensor(rate))
        for level, rate in zip(levels, rates, strict=True)
    ]
    base = 4 / 256
    expected = {"bpp_level_0": base, "bpp_level_1": base + 0.125, "bpp_level_3": base + 0.375}
    assert stage.logs(seen) == pytest.approx(expected)
    assert stage.logs([replace(seen[0], level=None)]) == {}


def test_terms_of_factor_0_are_left_out():
    terms = perceptual_terms({"lpips": 0.0, "ms_ssim": 0.5})
    assert list(terms) == ["ms_ssim"]
    assert list(new_stage("gt", "gt.perceptual={lpips: 0.0}").factors) == ["distortion"]


def test_the_noise_on_stage_gts_latent():
    """`latent_noise` times the sample's own normal numbers, scaled to the deviation that `latent_scale` names."""
    given = {}

    def model(image, noise=None, common=None):
        given.update(image=image, noise=noise, common=common)
        return image

    stage = new_stage("gt", "gt.latent_noise=0.25", "gt.latent_scale=common")
    assert stage.draw_params(32, 48) == DrawParams((8, 2, 3), steps=1)
    batch = batch_of(stage)
    assert stage.forward(model, batch).image is batch.image and given["common"] is True
    torch.testing.assert_close(given["noise"], 0.25 * batch.draws["noise"])
    assert given["noise"].shape == (2, 8, 2, 2)
    new_stage("gt", "gt.latent_noise=0.25").forward(model, batch)
    assert given["common"] is False
    new_stage("gt", "gt.latent_noise=0.25", "gt.latent_scale=kept").forward(model, batch)
    assert given["common"] is True
    plain = new_stage("gt")
    plain.forward(model, batch_of(plain))
    assert given["noise"] is None


def test_the_codec_stage_asks_for_its_random_numbers():
    """A latent of 2 x 3 positions: 8 channels of noise; 6 channels of s and 3 x 1 x 1 of z take 39 uniform numbers."""
    options = ("codec.last_step_share=0.7", "codec.base_only_share=0.1", "codec.shift=false", "seed=5")
    stage = new_stage("codec", *options, residual=True)
    expected = DrawParams(
        (8, 2, 3), steps=2, last_step_share=0.7, decoder_input=True, base_only_share=0.1, levels=3, uniforms=39
    )
    assert stage.draw_params(32, 48) == expected
    drawn = stage.drawn([7, 3], (32, 48))
    for row, position in enumerate((7, 3)):
        for name, value in draw(expected, 5, position).items():
            assert torch.equal(drawn[name][row], value), name
    published = new_stage("codec", "codec.forward=published").draw_params(32, 48)
    assert published == DrawParams((8, 2, 3), steps=2, base_only_share=0.2)
    assert new_stage("gt").draw_params(32, 48) is None
    given = stage.forward(
        lambda image, draws, decode, twice, copies: SimpleNamespace(image=image, draws=draws),
        Batch(None, torch.tensor([7, 3]), drawn),
    )
    assert given.draws.shift is False and torch.equal(given.draws.noise, drawn["noise"])
    assert math.isclose(given.draws.spread[0], drawn["spread"][0])


def test_the_size_of_the_denoisers_maps_is_drawn_for_every_step():
    """By the position of its first crop: rows and columns apart, all of what is asked for."""
    stage = new_stage("codec", "codec.copies=[1, 3]")

    def copies(*positions: int, stage=stage) -> tuple[int, int]:
        batch = Batch(None, torch.tensor(positions), stage.drawn(positions, (32, 32)))
        return stage.forward(lambda image, draws, decode, twice, copies: copies, batch)

    found = [copies(position, 0) for position in range(0, 60, 2)]
    other = new_stage("codec", "codec.copies=[1, 3]", "seed=7")
    assert [copies(p, stage=other) for p in range(0, 60, 2)] != found
    assert set(found) == {(1, 1), (1, 3), (3, 1), (3, 3)} and copies(4, 5) == found[2]
    assert new_stage("codec").params.copies == (1,)
    with pytest.raises(ConfigError, match=r"copies \[0\]: whole numbers from 1"):
        new_stage("codec", "codec.copies=[0]")


@pytest.mark.parametrize("deviation, told", [(0.5, True), (0.8, False), (1.3, False), (2.0, True)])
def test_a_latent_that_the_noise_schedule_is_not_made_for_is_told(deviation, told, monkeypatch):
    stage = new_stage("codec")
    latent = deviation * torch.tensor([-1.0, 1.0]).repeat(500)
    monkeypatch.setattr(stage.codec, "to_latent", lambda image: latent)
    remark = stage.remark(batch_of(stage))
    assert (f"standard deviation is {deviation:.2f}" in remark) if told else remark is None
