"""The denoiser's input, in training and in decoding, in both adapters: written out, with the signs."""

import math
from dataclasses import replace

import pytest
import torch

import models.codec
from models import bitstream
from models.noise import normal
from models.records import Draws, Sampling
from models.residual_networks import hyper_size
from tests.residual import D, new_codec, picture
from tests.small_codec import Traced
from utils.images import to_signed

ADAPTERS = ("published", "difference")
SIZE = (40, 70)
LATENT = (3, 5)
KAPPA = 2.0


def with_adapter(adapter: str):
    codec = new_codec(adapter=adapter)
    codec.residual.train_rates()
    return codec


@pytest.fixture(scope="module", params=ADAPTERS)
def codec(request):
    """With a residual codec, so that y^ is not y."""
    return with_adapter(request.param)


def expected_input(codec, x_t, y_hat, z_q, eta):
    """(scaled input, lq): x_t and z_q, or the difference x_t - y^ and y^; over sqrt(1 + kappa^2 eta). eta: (N,)."""
    scale = torch.tensor([math.sqrt(1 + KAPPA**2 * e) for e in eta]).view(-1, 1, 1, 1)
    return (x_t / scale, z_q) if codec.params.adapter == "published" else ((x_t - y_hat) / scale, y_hat)


def assert_told(call, scaled, lq, times):
    torch.testing.assert_close(call[0], scaled, rtol=0, atol=2e-5)
    torch.testing.assert_close(call[2], lq, rtol=0, atol=2e-5)
    assert call[1].tolist() == pytest.approx(times, abs=1e-5)


@torch.no_grad()
def decoded_parts(codec, data):
    """z_q, y^ and the noise of a file, without the codec's own rendering."""
    contents = codec.read(data)
    k, coded = contents.k, contents.symbols
    z_q = codec.vq_base.quantize.embedding.weight[k].permute(0, 3, 1, 2)
    y = codec.vq_base.decoder(codec.vq_base.post_quant_conv(z_q))
    r_hat = codec.residual.restore(coded.hyper, coded.residual, k, y, contents.file.residual.code)
    assert r_hat.abs().max() > 0.01
    noise = normal(bitstream.noise_seed(contents.file.base), 0, (D, *LATENT))
    return z_q, y + r_hat, noise, contents.file


@torch.no_grad()
def test_decoding_in_one_step(codec):
    """x~ = y^ + kappa sqrt(eta) eps with eta = 0.02 / B, B of all sections; t(eta) for the T = 2 of the schedule."""
    data = codec.compress(picture(*SIZE), quality=100)
    z_q, y_hat, noise, file = decoded_parts(codec, data)
    sections = len(file.base), len(file.residual.hyper), len(file.residual.symbols)
    eta = max(0.02 / (8 * sum(sections) / (256 * 15)), 0.02)
    x_t = y_hat + KAPPA * math.sqrt(eta) * noise
    time = (math.log(math.sqrt(eta) / 0.02) / math.log(40)) ** (1 / 0.3)
    traced = Traced(codec, data)
    assert traced.decoded.eta == pytest.approx(eta)
    assert_told(traced.calls[0], *expected_input(codec, x_t, y_hat, z_q, [eta]), [time])


@torch.no_grad()
def test_decoding_in_the_steps_of_the_schedule(codec):
    """From y^ + kappa sqrt(0.64) eps; then 0.9906 x_0 + 0.025 x_t - 0.0156 y^ (test_diffusion), told eta = 0.0004."""
    data = codec.compress(picture(*SIZE), quality=100)
    z_q, y_hat, noise, _ = decoded_parts(codec, data)
    predicted = []
    handle = codec.unet.register_forward_hook(lambda *given: predicted.append(given[-1].clone()))
    traced = Traced(codec, data, Sampling(steps=2))
    handle.remove()
    x_t = y_hat + KAPPA * 0.8 * noise
    assert_told(traced.calls[0], *expected_input(codec, x_t, y_hat, z_q, [0.64]), [1])
    x_t = 0.9906 * predicted[0] + 0.025 * x_t - 0.0156 * y_hat
    assert_told(traced.calls[1], *expected_input(codec, x_t, y_hat, z_q, [0.0004]), [0])


@pytest.mark.parametrize("branch", ["detail_branch", "perceptual_branch"])
def test_a_branch_that_is_off_tells_nothing(monkeypatch, branch):
    """Without the details x~ is the noise alone, without the perceptual branch lq is 0; the other stays."""
    codec = with_adapter("published")
    data = codec.compress(picture(*SIZE), quality=100)
    z_q, y_hat, noise, _ = decoded_parts(codec, data)
    monkeypatch.setattr(codec, "params", replace(codec.params, **{branch: False}))
    if branch == "detail_branch":
        y_hat = torch.zeros_like(y_hat)
    else:
        z_q = torch.zeros_like(z_q)
    traced = Traced(codec, data, Sampling(eta=0.64))
    assert_told(traced.calls[0], (y_hat + KAPPA * 0.8 * noise) / math.sqrt(1 + 4 * 0.64), z_q, [1])


@torch.no_grad()
def test_training(codec):
    """Rows: the decoder's own input without and with a residual, and both steps of the published forward process."""
    image = torch.stack([to_signed(picture(48, 64, seed)) for seed in range(4)])
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(4, D, 3, 4, generator=random)
    count = codec.residual.params.channels * 12 + codec.residual.params.hyper_channels * math.prod(hyper_size(3, 4))
    uniform = torch.rand(4, count, generator=random) - 0.5
    level = torch.tensor([0.0, 2.5, 1.0, 3.0], dtype=torch.float64)
    own = torch.tensor([True, True, False, False])
    draws = Draws(torch.tensor([0, 1, 1, 0]), torch.full((4,), 0.5, dtype=torch.float64), own, noise, level, uniform)
    calls = []
    handle = codec.unet.register_forward_pre_hook(lambda _, given: calls.append(given))
    out = codec(image, draws)
    handle.remove()

    x = codec.autoencoder.encode(image)
    z_q = codec.vq_base.quantize.embedding.weight[out.base.indices].permute(0, 3, 1, 2)
    y = codec.vq_base.reconstruct(z_q)
    residual = codec.residual(x, y, out.base.indices, level, uniform)
    y_hat = y + (level > 0).float().view(4, 1, 1, 1) * residual.r_hat
    torch.testing.assert_close(out.y_hat, y_hat, rtol=0, atol=1e-5)
    bits = residual.hyper_bits[1] + residual.residual_bits[1]
    # log2 K = 4 bits per 16x16 pixels for the base alone: 0.02 / (4 / 256) = 1.28, limited to 1; the residual's bits are
    # of 48x64 pixels. Half of both, by the spread.
    eta = [0.5, 0.5 * max(0.02 / (4 / 256 + bits.item() / (48 * 64)), 0.02), 0.64, 0.0004]
    assert 0.01 < eta[1] < 0.1
    x_t = torch.stack(
        [
            y_hat[0] + KAPPA * math.sqrt(eta[0]) * noise[0],
            y_hat[1] + KAPPA * math.sqrt(eta[1]) * noise[1],
            0.36 * x[2] + 0.64 * y_hat[2] + KAPPA * 0.8 * noise[2],
            0.9996 * x[3] + 0.0004 * y_hat[3] + KAPPA * 0.02 * noise[3],
        ]
    )
    times = [(math.log(math.sqrt(e) / 0.02) / math.log(40)) ** (1 / 0.3) for e in eta]
    assert_told(calls[0], *expected_input(codec, x_t, y_hat, z_q, eta), times)


def test_the_picture_depends_on_the_noise(codec, monkeypatch):
    """With random weights, the negative of the noise and none at all give other pictures."""
    data = codec.compress(picture(*SIZE), quality=100)
    drawn, sampling = models.codec.portable_noise, Sampling(eta=0.64)
    pictures = {}
    for sign in (1, -1, 0):
        monkeypatch.setattr(models.codec, "portable_noise", lambda *a, s=sign: (s * noise for noise in drawn(*a)))
        pictures[sign] = codec.decode(data, sampling).image.int()
    for sign in (-1, 0):
        assert (pictures[sign] - pictures[1]).abs().float().mean() > 0.5
