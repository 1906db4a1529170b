"""The whole codec with tiny random networks: files, and decoding from bytes alone."""

import math

import numpy as np
import pytest
import torch

from models import bitstream, diffusion, entropy_coding
from models.autoencoder import AutoencoderParams
from models.diffusion import RateParams
from models.noise import normal, portable_noise
from models.records import CodecParams, Sampling
from models.unet import UNetParams
from models.vq_base import VQBaseParams
from tests.residual import D, picture
from tests.small_codec import PARAMS, K, Traced, new_codec, y_of
from utils.errors import BitstreamError, CheckpointError
from utils.images import to_signed, to_uint8

BITS = 6  # log2 K
SIZES = [(16, 16), (17, 31), (250, 333), (16, 200), (64, 48)]


@pytest.fixture(scope="module")
def codec():
    return new_codec().requires_grad_(False)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_picture_comes_back_in_its_size(codec, size):
    """Its bytes, and eta from the length of the base alone, are known beforehand."""
    data = codec.compress(picture(*size))
    decoded = codec.decode(data)
    assert decoded.image.shape == (3, *size) and decoded.image.dtype == torch.uint8
    assert torch.equal(codec.decompress(data), decoded.image) and codec.compress(picture(*size)) == data
    h, w = -(-size[0] // 16), -(-size[1] // 16)
    section = -(-h * w * BITS // 8)
    sizes = sum(1 if value < 128 else 2 for value in (*size, section))
    assert len(data) == 3 + 1 + 1 + 4 + sizes + section + 4
    assert decoded.eta == pytest.approx(0.02 / (8 * section / (256 * h * w)), rel=1e-12)


@torch.no_grad()
def test_the_file_holds_the_indices_of_the_latent(codec):
    image = picture(250, 333)
    contents = codec.read(codec.compress(image))
    file, k = contents.file, contents.k
    assert (file.height, file.width, file.fingerprint) == (250, 333, codec.fingerprint) and file.fixed_length
    expected = codec.vq_base.indices(codec.to_latent(to_signed(image)[None]))
    assert torch.equal(k, expected) and expected.unique().numel() > 10  # the picture uses the code book


@torch.no_grad()
def test_decoding_is_the_equations(codec):
    """x~ = y + kappa sqrt(eta) eps, x^ = U(x~ / sqrt(1 + kappa^2 eta), t(eta), z_q), X^ = D(x^), written out."""
    data = codec.compress(picture(40, 70))
    contents = codec.read(data)
    file, k = contents.file, contents.k[0]
    z_q = codec.vq_base.quantize.embedding.weight[k].permute(2, 0, 1)[None]
    y = codec.vq_base.decoder(codec.vq_base.post_quant_conv(z_q))
    noise = normal(bitstream.noise_seed(file.base), 0, (D, 3, 5))
    eta = 0.02 / (8 * len(file.base) / (256 * 3 * 5))
    x = (y + 2 * math.sqrt(eta) * noise) / math.sqrt(1 + 4 * eta)
    t = 3 * (math.log(math.sqrt(eta) / 0.02) / math.log(0.8 / 0.02)) ** (1 / 0.3)
    image = codec.autoencoder.decode(codec.unet(x, torch.tensor([t]), z_q))[0, :, :40, :70]
    difference = codec.decompress(data).int() - to_uint8(image).int()
    assert difference.abs().max() <= 1 and difference.bool().float().mean() < 0.001


def test_nothing_but_the_bytes_decides(codec):
    data = codec.compress(picture(64, 48))
    decoded = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        state = torch.get_rng_state(), np.random.get_state()[1].copy()
        decoded.append(codec.decompress(data))
        assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
        codec.decompress(codec.compress(picture(16, 16, seed)))  # what was coded before does not matter
    assert torch.equal(*decoded)


def test_other_weights_are_refused_and_both_are_named(codec, monkeypatch):
    data = codec.compress(picture(16, 16))
    monkeypatch.setattr(codec, "fingerprint", b"\xaa\xbb\xcc\xdd")
    with pytest.raises(CheckpointError, match="01020304.*aabbccdd"):
        codec.decompress(data)
    monkeypatch.setattr(codec, "fingerprint", None)
    with pytest.raises(CheckpointError, match="01020304"):
        codec.decompress(data)
    with pytest.raises(CheckpointError, match="fingerprint"):
        codec.compress(picture(16, 16))


def test_too_small_pictures_are_refused(codec):
    for size in ((15, 16), (400, 8)):
        with pytest.raises(ValueError, match="16x16"):
            codec.compress(picture(*size))


def test_a_picture_that_is_not_finite_is_refused(codec, monkeypatch):
    data = codec.compress(picture(16, 16))
    monkeypatch.setattr(codec.autoencoder, "decode", lambda x: torch.full((1, 3, 16, 16), math.nan))
    with pytest.raises(BitstreamError, match="not finite"):
        codec.decompress(data)


def test_a_table_shortens_the_file_and_keeps_the_indices(codec, monkeypatch):
    image = picture(250, 333)
    plain = codec.read(codec.compress(image))
    counts = np.bincount(plain.k.flatten().numpy(), minlength=K)
    monkeypatch.setattr(codec, "base_table", entropy_coding.frequency_table(counts))
    data = codec.compress(image)
    contents = codec.read(data)
    file = contents.file
    assert not file.fixed_length and torch.equal(contents.k, plain.k) and len(file.base) < len(plain.file.base)
    # A range-coded file has a rate of its own, and with it a noise level of its own.
    h, w = file.latent_size
    rate = 8 * len(file.base) / (256 * h * w)
    assert codec.decode(data).eta == RateParams().eta(rate) > RateParams().eta(codec.nominal_bpp)


def test_what_sampling_changes(codec):
    data = codec.compress(picture(64, 48))
    plain = Traced(codec, data)
    eta = plain.decoded.eta
    assert len(plain.calls) == 1

    def differs(other):
        return not torch.equal(other.decoded.image, plain.decoded.image)

    same = Traced(codec, data, Sampling(eta=eta, seed=bitstream.noise_seed(codec.read(data).file.base), ddim=False))
    assert not differs(same) and torch.equal(same.calls[0][0], plain.calls[0][0])

    louder = Traced(codec, data, Sampling(eta=0.9))
    assert louder.decoded.eta == 0.9 and differs(louder)
    expected = diffusion.time_of_eta(torch.tensor(0.9, dtype=torch.float64), PARAMS.diffusion).item()
    assert louder.times == [pytest.approx(expected, rel=1e-6)]
    noise = [call * math.sqrt(1 + 4 * e) for call, e in ((plain.calls[0][0], eta), (louder.calls[0][0], 0.9))]
    y = y_of(codec, data)
    torch.testing.assert_close((noise[0] - y) / math.sqrt(eta), (noise[1] - y) / math.sqrt(0.9), rtol=0, atol=1e-4)

    reseeded = Traced(codec, data, Sampling(seed=5))
    assert reseeded.decoded.eta == eta and reseeded.times == plain.times and differs(reseeded)
    for other in (louder, reseeded):
        assert torch.equal(other.calls[0][2], plain.calls[0][2])  # z_q


@torch.no_grad()
def test_several_steps(codec):
    """Sampling(steps=2) runs the schedule's own levels on the file's own noise; DDIM draws once, ancestral per step."""
    data = codec.compress(picture(64, 48))
    schedule = codec.schedule.spaced(2)
    seed = bitstream.noise_seed(codec.read(data).file.base)
    z_q, y = codec.vq_base.rows(codec.read(data).k), y_of(codec, data)
    images = {}
    for ddim in (True, False):
        traced = Traced(codec, data, Sampling(steps=2, ddim=ddim))
        assert traced.times == [2, 0] and traced.decoded.eta == schedule.etas[-1]
        noise = portable_noise(seed, y)
        x_hat = diffusion.sample(schedule, codec.unet, y, z_q, lambda noise=noise: next(noise), ddim)
        images[ddim] = traced.decoded.image
        assert torch.equal(images[ddim], to_uint8(codec.autoencoder.decode(x_hat)[0, :, :64, :48]))
        assert torch.equal(codec.decode(data, Sampling(steps=2, ddim=ddim)).image, images[ddim])
    assert not torch.equal(images[True], images[False])
    assert Traced(codec, data, Sampling(steps=9)).times == [3, 2, 1, 0]  # asking for more keeps all


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (dict(vq_base=VQBaseParams(in_channels=9)), "in_channels"),
        (dict(unet=UNetParams(latent_channels=9)), "latent_channels"),
        (dict(unet=UNetParams(condition_channels=9)), "condition_channels"),
        (dict(vq_base=VQBaseParams(ch_mult=(1, 2))), "one resolution"),
        (dict(autoencoder=AutoencoderParams(patch=4)), "patch 4, .* must be 16 .*, not 64"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(part, message):
    with pytest.raises(ValueError, match=message):
        CodecParams(**part)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"eta": 0.0}, {"eta": 1.5}], ids=str)
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("size", [(48, 80), (40, 70)], ids=str)
def test_grey_is_sharpened_and_colour_blurred_by_hand(codec, monkeypatch, size):
    """Red is 0.5 more at one pixel: grey 1/6, red less grey 1/3, green and blue less grey -1/6. Their means over 3x3 pixels
    differ by a ninth of that. Half of the grey's difference is added, and all of the colour's taken away.
    """
    image = torch.tensor([0.2, 0.0, 0.1]).view(1, 3, 1, 1).repeat(1, 1, 48, 80)
    image[0, 0, 20, 30] += 0.5
    monkeypatch.setattr(codec.autoencoder, "decode", lambda x_hat: image)
    x_hat = torch.zeros(1, D, 3, 5)
    assert torch.equal(codec.picture(x_hat), image)
    sharper = image.clone()
    sharper[0, :, 19:22, 29:32] -= 0.5 / 54
    sharper[0, :, 20, 30] += 0.5 / 6
    params = codec.params
    monkeypatch.setattr(codec, "params", params.with_rules({"sharpening": 0.5}))
    torch.testing.assert_close(codec.picture(x_hat), sharper)
    share = torch.tensor([1 / 3, -1 / 6, -1 / 6]).view(3, 1, 1)
    sharper[0, :, 19:22, 29:32] += share / 9
    sharper[0, :, 20, 30] -= share[:, 0, 0]
    monkeypatch.setattr(codec, "params", params.with_rules({"sharpening": 0.5, "colour_blur": 1.0}))
    torch.testing.assert_close(codec.picture(x_hat), sharper)
    with monkeypatch.context() as instead:
        instead.setattr(codec, "light", lambda x_hat: image)
        torch.testing.assert_close(codec.picture(x_hat), sharper)
    decoded = codec.decompress(codec.compress(picture(*size)))
    assert torch.equal(decoded, to_uint8(sharper[0, :, : size[0], : size[1]]))


@pytest.mark.parametrize("rule", ["sharpening", "colour_blur"])
def test_rules_of_the_picture_are_shares(rule):
    with pytest.raises(ValueError, match=f"{rule} 1.5: 0 to 1"):
        CodecParams().with_rules({rule: 1.5})
    assert CodecParams().rules == {"sharpening": 0.0, "colour_blur": 0.0}
