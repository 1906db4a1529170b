"""The terms of both stages' losses on numbers computed by hand, and what the terms are given."""

import inspect
import math
from types import SimpleNamespace

import lpips
import numpy as np
import pytest
import pytorch_msssim
import torch

from datapipe.draws import DrawParams, draw
from datapipe.pictures import Batch
from models.losses import ms_ssim_loss
from models.records import CodecOutput
from models.vq_base import BaseCode
from tests.stages import new_stage
from training.perceptual import Lpips, perceptual_term
from training.stage import Restored

RANDOM = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RANDOM.uniform(-1, 1, shape)


class Recorder:
    """A perceptual term that keeps what it is given; neither symmetric nor zero at equal pictures."""

    def __call__(self, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.image, self.target = image, target
        return (2 * image - target).mean() + 3


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
        "gt.perceptual_weight=0.3",
    )
    stage.perceptual = Recorder()
    image, target = numbers(2, 3, 2, 3), numbers(2, 3, 2, 3)
    terms = stage.losses(Restored(torch.tensor(image)), Batch(torch.tensor(target), torch.arange(2)))
    error = np.abs(image - target) if kind == "l1" else (image - target) ** 2
    expected = {
        "distortion": error.mean(),
        "perceptual": (2 * image - target).mean() + 3,
        "chroma": chroma(image, target),
    }
    expected["loss"] = 1.5 * expected["distortion"] + 0.3 * expected["perceptual"] + 0.7 * expected["chroma"]
    assert as_floats(terms) == pytest.approx(expected, rel=1e-9)


def made_up(levels: list[float], auxiliary: float | None = None) -> tuple[CodecOutput, Batch, dict]:
    """An output of the codec that no network made, the batch it belongs to, and its arrays by name."""
    n = len(levels)
    arrays = {"image": numbers(n, 3, 2, 3), "target": numbers(n, 3, 2, 3), "z": numbers(n, 2, 1, 2)}
    arrays |= {"z_q": numbers(n, 2, 1, 2), "bpp": np.array([0.3, 0.11, 0.23, 0.47, 0.05][:n])}
    t = {name: torch.tensor(array) for name, array in arrays.items()}
    base = BaseCode(t["z"], t["z_q"], torch.zeros(n, 1, 2).long(), torch.zeros(16), torch.zeros(16, 2))
    latent = torch.zeros(n, 1, 1, 2)
    out = CodecOutput(
        latent, latent, latent, t["image"], base, t["bpp"], None if auxiliary is None else torch.tensor(auxiliary)
    )
    level = torch.tensor(levels, dtype=torch.float64)
    return out, Batch(t["target"], torch.arange(n), {"level": level}), arrays


def test_the_loss_of_stage_codec():
    """L = w_d D + w_p P + beta C + w_c chroma + mean of lambda_g R; lambda is geometric from level 1 to 3, here halved
    with every half level; `auxiliary` is told and stays outside."""
    stage = new_stage(
        "codec",
        "codec.distortion_weight=0.9",
        "codec.perceptual_weight=0.35",
        "codec.commitment=0.15",
        "codec.chroma_weight=0.6",
        "codec.rate_weights=[2.0,0.125]",
        residual=True,
    )
    stage.perceptual = Recorder()
    out, batch, a = made_up([0.0, 1.0, 2.0, 2.5, 3.0], auxiliary=1000.0)
    image, target = a["image"], a["target"]
    expected = {
        "distortion": ((image - target) ** 2).mean(),
        "perceptual": (2 * image - target).mean() + 3,
        "commitment": ((a["z"] - a["z_q"]) ** 2).mean(),
        "chroma": chroma(image, target),
        "rate": (np.array([2.0, 2.0, 0.5, 0.25, 0.125]) * a["bpp"]).mean(),
        "auxiliary": 1000.0,
    }
    factors = {"distortion": 0.9, "perceptual": 0.35, "commitment": 0.15, "chroma": 0.6, "rate": 1.0}
    expected["loss"] = sum(factor * expected[name] for name, factor in factors.items())
    assert as_floats(stage.losses(out, batch)) == pytest.approx(expected, rel=1e-9)


def test_the_codec_stages_loss_without_its_options():
    """The paper's three terms, and its factors, when there is no residual and no chroma."""
    stage = new_stage("codec")
    stage.perceptual = Recorder()
    out, batch, _ = made_up([0.0, 0.0])
    terms = as_floats(stage.losses(out, batch))
    assert set(terms) == {"distortion", "perceptual", "commitment", "loss"}
    parts = 0.8 * terms["distortion"] + 0.2 * terms["perceptual"] + 0.25 * terms["commitment"]
    assert terms["loss"] == pytest.approx(parts, rel=1e-12)


@pytest.mark.parametrize("name", ["gt", "codec"])
def test_the_perceptual_term_is_given_the_pictures_as_they_are(name):
    """In [-1, 1], as LPIPS takes them: first the restored, then the original."""
    stage, recorder = new_stage(name), Recorder()
    stage.perceptual = recorder
    out, batch, _ = made_up([0.0, 0.0])
    stage.losses(out, batch)
    assert torch.equal(recorder.image, out.image) and torch.equal(recorder.target, batch.image)
    assert recorder.image.min() < 0 and recorder.target.min() < 0


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
    image, target = (torch.tensor(numbers(3, 3, 16, 16)).float() for _ in range(2))
    assert Lpips(untrained=False)(image, target).item() == 3.0  # a mean over the batch
    assert given["net"] == "vgg" and given["pretrained"] and not given["pnet_rand"]
    assert torch.equal(given["image"], image) and torch.equal(given["target"], target) and not given["normalize"]


def test_ms_ssim_is_given_luma_in_0_to_1(monkeypatch):
    """Of BT.601: 0.299 R + 0.587 G + 0.114 B of pictures moved from [-1, 1] to [0, 1]."""
    given = {}

    def fake(image, target, data_range):
        given.update(image=image, target=target, data_range=data_range)
        return torch.tensor(0.8)

    monkeypatch.setattr(pytorch_msssim, "ms_ssim", fake)
    image = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)  # 0, 0.5, 1
    target = torch.tensor([1.0, -1.0, -0.5]).view(1, 3, 1, 1)  # 1, 0, 0.25
    assert ms_ssim_loss(image, target).item() == pytest.approx(0.2)
    assert given["image"].item() == pytest.approx(0.587 * 0.5 + 0.114)
    assert given["target"].item() == pytest.approx(0.299 + 0.114 * 0.25)
    assert given["data_range"] == 1.0


def test_the_perceptual_term_falls_towards_the_original():
    """1 - MS-SSIM: 0 at the original, and smaller the nearer a picture is."""
    term = perceptual_term("ms_ssim")
    target = torch.rand(1, 3, 176, 176, generator=torch.Generator().manual_seed(0)) * 2 - 1
    near, far = (target + scale * torch.randn(target.shape, generator=torch.manual_seed(1)) for scale in (0.1, 0.5))
    assert term(target, target).item() == pytest.approx(0, abs=1e-5)
    assert 0.001 < term(near, target) < term(far, target)
    assert perceptual_term("none")(near, target).item() == 0


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
    given = stage.forward(lambda image, draws: SimpleNamespace(image=image, draws=draws), Batch(None, None, drawn))
    assert given.draws.shift is False and torch.equal(given.draws.noise, drawn["noise"])
    assert math.isclose(given.draws.spread[0], drawn["spread"][0])
