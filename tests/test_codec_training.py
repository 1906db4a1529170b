"""The training pass of the whole codec with tiny random networks: what it sees, and what learns from it."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from models import bitstream, diffusion
from models.codec import Codec
from models.noise import portable_noise
from models.records import ONE_STEP, Draws, Sampling
from tests.residual import D, picture
from tests.residual import new_codec as with_residual
from tests.small_codec import PARAMS, Traced, new_codec, y_of
from training.config import TrainConfig
from training.stage_config import CodecStageParams
from training.stages import CodecStage
from training.step import Step
from utils.images import to_signed, to_uint8


@pytest.fixture(scope="module")
def codec():
    return new_codec().requires_grad_(False)


def draws(codec, t, eta, shape, seed=0):
    """Draws of the decoder's own input with noise level eta, or of the published forward process where eta is None."""
    noise = torch.randn(len(t), *shape, generator=torch.Generator().manual_seed(seed))
    own = torch.tensor([level is not None for level in eta])
    levels = torch.tensor([level or 1.0 for level in eta], dtype=torch.float64)
    return Draws(torch.tensor(t), levels / codec.rate.eta(codec.nominal_bpp), own, noise)


def test_noisy_input(codec):
    """Per sample: the decoder's own input where eta is given at the last step, the published one elsewhere."""
    x, y = torch.randn(2, 4, D, 2, 3, generator=torch.Generator().manual_seed(1))
    given = draws(codec, [3, 3, 1, 0], [0.5, None, None, None], (D, 2, 3))
    x_t, eta = codec.noisy_input(x, y, torch.zeros(4), given)
    etas = codec.schedule.etas.tolist()
    assert eta.tolist() == pytest.approx([0.5, etas[3], etas[1], etas[0]], abs=1e-15)
    torch.testing.assert_close(x_t[0], y[0] + 2 * math.sqrt(0.5) * given.noise[0])
    for i, t in ((1, 3), (2, 1), (3, 0)):
        published = x[i] + etas[t] * (y[i] - x[i]) + 2 * math.sqrt(etas[t]) * given.noise[i]
        torch.testing.assert_close(x_t[i], published, rtol=0, atol=1e-6)
    everywhere = draws(codec, [3, 2, 1, 0], [None] * 4, (D, 2, 3))
    expected = diffusion.q_sample(codec.schedule, x, y, everywhere.t, everywhere.noise)
    assert torch.equal(codec.noisy_input(x, y, torch.zeros(4), everywhere)[0], expected)
    # At the decoder's own input the original does not enter.
    other, _ = codec.noisy_input(-x, y, torch.zeros(4), given)
    assert torch.equal(other[0], x_t[0]) and not torch.equal(other[1], x_t[1])


def test_eta_falls_with_the_rate_of_the_residual(codec):
    """spread * c / (nominal + residual), c = 0.02: the quotient is limited to 0.02..1, the product to 1."""
    assert codec.nominal_bpp == 6 / 256
    rows = [
        (0.0, 1.0, 0.02 / (6 / 256)),  # 0.853333
        (10 / 256, 1.0, 0.32),  # 0.02 / (16 / 256)
        (10 / 256, 1.25, 0.4),
        (10.0, 0.5, 0.01),  # half of the least
        (0.0, 1.25, 1.0),  # 1.0667, but for the limit
    ]
    bpp, spread, expected = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    x, y, noise = torch.randn(3, 5, D, 2, 3, generator=torch.Generator().manual_seed(1))
    x_t, eta = codec.noisy_input(x, y, bpp.float(), Draws(torch.zeros(5).long(), spread, torch.ones(5).bool(), noise))
    torch.testing.assert_close(eta, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(x_t, y + (2 * expected.sqrt().float()).view(5, 1, 1, 1) * noise)


def test_eta_passes_no_gradient_to_the_rate(monkeypatch):
    """The noise level is told, not learnt: the picture's terms do not move the rate by way of eta."""
    codec = with_residual().requires_grad_(True)
    codec.residual.train_rates()
    bpp, noisy_input = [], codec.noisy_input
    monkeypatch.setattr(codec, "noisy_input", lambda x, y, b, draws: bpp.append(b) or noisy_input(x, y, b, draws))
    given = draws(codec, [1], [0.5], (8, 2, 2))
    uniform = torch.zeros(1, codec.residual.noise_size(2, 2))
    out = codec(torch.zeros(1, 3, 32, 32), replace(given, level=torch.tensor([2.0]), uniform=uniform))
    assert not out.x.requires_grad  # E is frozen in this stage
    assert out.residual_bpp.requires_grad and torch.equal(bpp[0], out.residual_bpp) and not bpp[0].requires_grad


def test_without_the_shift(codec):
    """The ablation's forward process: x + kappa sqrt(eta_t) noise."""
    x, y, noise = torch.randn(3, 1, D, 2, 3, generator=torch.Generator().manual_seed(1))
    given = Draws(torch.tensor([3]), torch.ones(1), torch.zeros(1).bool(), noise, shift=False)
    x_t, eta = codec.noisy_input(x, y, torch.zeros(1), given)
    assert eta.item() == pytest.approx(0.64)
    torch.testing.assert_close(x_t, x + 1.6 * noise, rtol=0, atol=1e-6)


def test_the_input_of_training_lies_where_the_networks_lie(codec):
    """A table left on the host meets `meta` as it would meet CUDA: with an error."""
    other = copy.deepcopy(codec).to("meta")
    with torch.device("meta"):
        out = other(torch.zeros(2, 3, 32, 32), draws(codec, [3, 1], [0.5, None], (D, 2, 2)))
    assert out.image.shape == (2, 3, 32, 32) and out.image.is_meta


@torch.no_grad()
def test_training_sees_what_the_decoder_sees(codec):
    """With the file's own eta and noise, the training pass predicts what decoding predicts."""
    image = picture(64, 48)
    data = codec.compress(image)
    traced = Traced(codec, data)
    noise = next(portable_noise(bitstream.noise_seed(codec.read(data).file.base), torch.zeros(1, D, 4, 3)))
    given = replace(draws(codec, [3], [traced.decoded.eta], (D, 4, 3)), noise=noise)
    out = codec(to_signed(image)[None], given)
    difference = to_uint8(out.image[0]).int() - traced.decoded.image.int()
    assert difference.abs().max() <= 1 and difference.bool().float().mean() < 0.001
    assert out.x.shape == out.y_hat.shape == out.x_hat.shape == (1, D, 4, 3)
    torch.testing.assert_close(out.y_hat, y_of(codec, data), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_denoiser_among_mirror_images(codec):
    """2 rows and 3 columns of a 4 x 3 latent: U sees 8 x 9 positions, each image mirrored at its edge, and the first is taken."""
    image, given = to_signed(picture(64, 48))[None], draws(codec, [3], [0.5], (D, 4, 3))
    plain = codec(image, given, decode=False)
    seen = []
    handle = codec.unet.register_forward_hook(lambda _, args, out: seen.append((*args, out)))
    try:
        out = codec(image, given, decode=False, copies=(2, 3))
        codec(image, given, decode=False)
    finally:
        handle.remove()
    (x, t, lq, made), (alone, t_alone, lq_alone, _) = seen
    assert x.shape == (1, D, 8, 9) and lq.shape[2:] == (8, 9) and torch.equal(t, t_alone)
    for wide, narrow in ((x, alone), (lq, lq_alone)):
        row = torch.cat([narrow, narrow.flip(3), narrow], dim=3)
        assert torch.equal(wide, torch.cat([row, row.flip(2)], dim=2))
    torch.testing.assert_close(out.x_hat, made[:, :, :4, :3])
    assert torch.equal(out.y_hat, plain.y_hat) and not torch.allclose(out.x_hat, plain.x_hat, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("adapter", ["difference", "published"])
def test_a_correction_is_added_to_what_the_decoder_knows(adapter):
    """prediction: correction. x^ = y^ + U in training and decoding, and U starts silent; `latent` has U alone."""
    ours = replace(PARAMS, adapter=adapter)
    codec, plain = Codec(replace(ours, prediction="correction")).eval(), Codec(ours).eval()
    codec.fingerprint = b"\x01\x02\x03\x04"
    image = picture(64, 48)
    out = codec(to_signed(image)[None], draws(codec, [3], [0.5], (D, 4, 3)))
    assert torch.equal(out.x_hat, out.y_hat)
    data = codec.compress(image)
    silent = to_uint8(codec.autoencoder.decode(y_of(codec, data))[0])
    for sampling in (ONE_STEP, Sampling(steps=2)):
        assert torch.equal(codec.decode(data, sampling).image, silent)
    torch.nn.init.normal_(codec.unet.out[-1].weight, std=0.1)
    x, y_hat = torch.randn(2, 1, D, 4, 3, generator=torch.Generator().manual_seed(1))
    t, lq = torch.tensor([2.5]), x.flip(2)
    torch.testing.assert_close(codec.denoiser(y_hat)(x, t, lq), y_hat + codec.unet(x, t, lq))
    assert not torch.equal(codec.decompress(data), silent)
    assert torch.equal(plain.denoiser(y_hat)(x, t, lq), plain.unet(x, t, lq))
    with pytest.raises(ValueError, match="detail_branch: false puts at 0"):
        replace(PARAMS, prediction="correction", detail_branch=False)


@pytest.mark.parametrize("eta", [None, 0.4], ids=["published", "decoder"])
def test_gradients_reach_all_that_is_trained(eta):
    codec = new_codec()
    stage = CodecStage(TrainConfig(networks=PARAMS, codec=CodecStageParams(perceptual={})), codec, torch.device("cpu"))
    image = torch.stack([to_signed(picture(48, 64, seed)) for seed in range(2)])
    out = codec(image, draws(codec, [3, 1], [eta, eta], (D, 3, 4)))
    (out.image.square().mean() + 0.25 * (out.base.z - out.base.z_q.detach()).square().mean()).backward()
    for name, parameter in codec.named_parameters():
        averaged = name.startswith("vq_base.quantize.")  # moved by averages, not by gradients
        if name.startswith("autoencoder.") or averaged:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    trained = {id(p) for p in Step(stage).optimiser.parameters}
    assert trained == {id(p) for n, p in codec.named_parameters() if p.grad is not None}
