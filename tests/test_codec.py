"""The whole codec with tiny random networks: files, decoding from bytes alone, and the training pass."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import bitstream, diffusion, entropy_coding
from models.autoencoder import AutoencoderParams
from models.codec import Codec, portable_noise
from models.diffusion import DiffusionParams, RateParams
from models.records import CodecParams, Draws, Sampling
from models.unet import UNetParams
from models.vq_base import VQBaseParams
from tests.networks import off_zero
from training.config import CodecStageParams, TrainConfig
from training.stages import CodecStage
from utils.errors import BitstreamError, CheckpointError
from utils.images import to_signed, to_uint8

D, K = 8, 64
BITS = 6  # log2 K
PARAMS = CodecParams(
    autoencoder=AutoencoderParams(
        ch=8, ch_mult=(1, 1, 1, 1, 2), num_res_blocks=1, z_channels=8, embed_dim=D, n_embed=0, groups=4
    ),
    vq_base=VQBaseParams(
        ch=8, ch_mult=(2,), num_res_blocks=1, z_channels=8, embed_dim=4, in_channels=D, codebook_size=K, groups=4
    ),
    unet=UNetParams(
        latent_channels=D,
        condition_channels=4,
        condition_width=4,
        model_channels=16,
        channel_mult=(1, 1, 1, 1),
        num_res_blocks=1,
        swin_embed_dim=16,
        head_channels=8,
        mlp_ratio=1,
        groups=8,
    ),
    diffusion=DiffusionParams(steps=4),
)
SIZES = [(16, 16), (17, 31), (250, 333), (16, 200), (64, 48)]


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=random)
    return to_uint8(torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0] * 2 - 1)


def new_codec() -> Codec:
    """Random weights, no layer at zero, a code book in the middle of the latents."""
    torch.manual_seed(0)
    codec = Codec(PARAMS)
    off_zero(codec)
    with torch.no_grad():
        codec.autoencoder.quant_conv.weight.mul_(10)
        z = codec.vq_base(codec.to_latent(to_signed(picture(256, 256, seed=9))[None])).z
        codec.vq_base.quantize.revive(z.permute(0, 2, 3, 1).flatten(0, 2)[:K], everything=True)
    codec.fingerprint = b"\x01\x02\x03\x04"
    return codec.eval()


@pytest.fixture(scope="module")
def codec():
    return new_codec().requires_grad_(False)


@pytest.fixture
def with_table(codec):
    """The same codec with a table that fits the picture 250x333."""
    with torch.no_grad():
        k = codec.vq_base.indices(codec.to_latent(to_signed(picture(250, 333))[None])).flatten().numpy()
    codec.base_table = entropy_coding.frequency_table(np.bincount(k, minlength=K))
    yield codec
    codec.base_table = None


def cells(height, width):
    return -(-height // 16), -(-width // 16)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_picture_comes_back_in_its_size(codec, size):
    data = codec.compress(picture(*size))
    decoded = codec.decompress(data)
    assert decoded.shape == (3, *size) and decoded.dtype == torch.uint8
    assert torch.equal(codec.decompress(data), decoded)
    h, w = cells(*size)
    section = -(-h * w * BITS // 8)
    sizes = sum(1 if value < 128 else 2 for value in (*size, section))
    assert len(data) == 3 + 1 + 1 + 4 + sizes + section + 4
    assert codec.compress(picture(*size)) == data


@pytest.mark.parametrize("size", [(17, 31), (250, 333)], ids=str)
@torch.no_grad()
def test_the_file_holds_the_indices_of_the_latent(codec, size):
    image = picture(*size)
    contents = codec.read(codec.compress(image))
    file, k = contents.file, contents.k[0]
    assert (file.height, file.width, file.fingerprint) == (*size, codec.fingerprint) and file.fixed_length
    expected = codec.vq_base.indices(codec.to_latent(to_signed(image)[None]))[0]
    assert torch.equal(k, expected) and k.dtype == torch.int64
    assert size == (17, 31) or expected.unique().numel() > 10  # the picture uses the code book


@torch.no_grad()
def test_decoding_is_the_equations(codec):
    """x~ = y + kappa sqrt(eta) eps, x^ = U(x~ / sqrt(1 + kappa^2 eta), t(eta), z_q), X^ = D(x^), written out."""
    data = codec.compress(picture(40, 70))
    contents = codec.read(data)
    file, k = contents.file, contents.k[0]
    z_q = codec.vq_base.quantize.embedding.weight[k].permute(2, 0, 1)[None]
    y = codec.vq_base.decoder(codec.vq_base.post_quant_conv(z_q))
    noise = np.random.RandomState(bitstream.noise_seed(file.base)).standard_normal((D, 3, 5)).astype(np.float32)
    eta = 0.02 / (8 * len(file.base) / (256 * 3 * 5))
    x = (y + 2 * math.sqrt(eta) * torch.from_numpy(noise)) / math.sqrt(1 + 4 * eta)
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


def test_noise_is_numpys_legacy_stream():
    """The first values are pinned: NumPy guarantees this stream, and files depend on it."""
    noise = portable_noise(0, torch.zeros(1, 2, 1, 2))
    first, second = next(noise), next(noise)
    expected = np.random.RandomState(0).standard_normal(8).astype(np.float32).reshape(2, 1, 2, 1, 2)
    assert np.array_equal(torch.stack([first, second]).numpy(), expected)
    assert first.flatten()[:2].tolist() == pytest.approx([1.76405235, 0.40015721], rel=1e-7)


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


def test_damaged_files_are_refused(codec):
    data = codec.compress(picture(17, 31))
    for end in range(len(data)):
        with pytest.raises(BitstreamError):
            codec.decompress(data[:end])
    for at in range(len(data)):
        with pytest.raises(BitstreamError):
            codec.decompress(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(BitstreamError, match="follow"):
        codec.decompress(data + b"\0")


def test_a_picture_that_is_not_finite_is_refused(codec, monkeypatch):
    data = codec.compress(picture(16, 16))
    monkeypatch.setattr(codec, "to_image", lambda x: torch.full((1, 3, 16, 16), math.nan))
    with pytest.raises(BitstreamError, match="not finite"):
        codec.decompress(data)


def test_a_table_shortens_the_file_and_keeps_the_indices(codec, with_table):
    image = picture(250, 333)
    data = with_table.compress(image)
    contents = with_table.read(data)
    file, k = contents.file, contents.k
    assert not file.fixed_length
    with_table.base_table, table = None, with_table.base_table
    plain = with_table.read(with_table.compress(image))
    fixed, expected = plain.file, plain.k
    assert torch.equal(k, expected) and len(file.base) < len(fixed.base)
    with_table.base_table = table
    # A range-coded file has a rate of its own, and with it a noise level of its own.
    h, w = file.latent_size
    rate = 8 * len(file.base) / (256 * h * w)
    assert with_table.decode(data).eta == RateParams().eta(rate) > RateParams().eta(codec.nominal_bpp)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_eta_follows_from_the_length_of_the_base_alone(codec, size):
    h, w = cells(*size)
    rate = 8 * -(-h * w * BITS // 8) / (256 * h * w)
    assert codec.decode(codec.compress(picture(*size))).eta == pytest.approx(0.02 / rate, rel=1e-12)
    assert codec.nominal_bpp == BITS / 256


class Traced:
    """What the denoiser is given while a file is decoded."""

    def __init__(self, codec, data, sampling=None):
        self.calls = []
        handle = codec.unet.register_forward_pre_hook(lambda _, args: self.calls.append([a.clone() for a in args]))
        try:
            self.decoded = codec.decode(data, *([sampling] if sampling else []))
        finally:
            handle.remove()

    @property
    def times(self):
        return [t.item() for _, t, _ in self.calls]


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
def y_of(codec, data):
    return codec.vq_base.reconstruct(codec.vq_base.rows(codec.read(data).k))


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
        assert torch.equal(images[ddim], to_uint8(codec.to_image(x_hat)[0, :, :64, :48]))
        assert torch.equal(codec.decode(data, Sampling(steps=2, ddim=ddim)).image, images[ddim])
    assert not torch.equal(images[True], images[False])
    assert Traced(codec, data, Sampling(steps=9)).times == [3, 2, 1, 0]  # asking for more keeps all


def test_parts_that_do_not_fit_are_refused():
    for part, message in [
        (dict(vq_base=VQBaseParams(in_channels=9)), "in_channels"),
        (dict(unet=UNetParams(latent_channels=9)), "latent_channels"),
        (dict(unet=UNetParams(condition_channels=9)), "condition_channels"),
        (dict(vq_base=VQBaseParams(ch_mult=(1, 2))), "one level"),
        (dict(autoencoder=AutoencoderParams(ch_mult=(1, 2))), "five levels"),
    ]:
        with pytest.raises(ValueError, match=message):
            CodecParams(**part)


# Training -----------------------------------------------------------------------------------------------------------


def draws(codec, t, eta, shape, seed=0):
    """Draws whose noise level at the last step is eta, or the published one where eta is NaN."""
    noise = torch.randn(len(t), *shape, generator=torch.Generator().manual_seed(seed))
    spread = torch.tensor(eta, dtype=torch.float64) / codec.rate.eta(codec.nominal_bpp)
    return Draws(torch.tensor(t), spread, noise)


def test_noisy_input(codec):
    """Per sample: the decoder's own input where eta is given at the last step, the published one elsewhere."""
    x, y = torch.randn(2, 4, D, 2, 3, generator=torch.Generator().manual_seed(1))
    given = draws(codec, [3, 3, 1, 0], [0.5, math.nan, 0.5, math.nan], (D, 2, 3))
    x_t, eta = codec.noisy_input(x, y, torch.zeros(4), given)
    etas = codec.schedule.etas
    assert eta.tolist() == pytest.approx([0.5, etas[3], etas[1], etas[0]], abs=1e-15)
    torch.testing.assert_close(x_t[0], y[0] + 2 * math.sqrt(0.5) * given.noise[0])
    for i, t in ((1, 3), (2, 1), (3, 0)):
        published = x[i] + etas[t] * (y[i] - x[i]) + 2 * math.sqrt(etas[t]) * given.noise[i]
        torch.testing.assert_close(x_t[i], published.float(), rtol=0, atol=1e-6)
    everywhere = draws(codec, [3, 2, 1, 0], [math.nan] * 4, (D, 2, 3))
    expected = diffusion.q_sample(codec.schedule, x, y, everywhere.t, everywhere.noise)
    assert torch.equal(codec.noisy_input(x, y, torch.zeros(4), everywhere)[0], expected)
    # At the decoder's own input the original does not enter.
    other, _ = codec.noisy_input(-x, y, torch.zeros(4), given)
    assert torch.equal(other[0], x_t[0]) and not torch.equal(other[1], x_t[1])


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
def test_a_correction_is_added_to_what_the_decoder_knows():
    """prediction: correction. x^ = y^ + U in training and decoding, and U starts silent; `latent` has U alone."""
    ours = replace(PARAMS, unet=replace(PARAMS.unet, condition_channels=D), adapter="difference")
    codec, plain = Codec(replace(ours, prediction="correction")).eval(), Codec(ours).eval()
    codec.fingerprint = b"\x01\x02\x03\x04"
    image = picture(64, 48)
    out = codec(to_signed(image)[None], draws(codec, [3], [0.5], (D, 4, 3)))
    assert torch.equal(out.x_hat, out.y_hat)
    data = codec.compress(image)
    silent = to_uint8(codec.to_image(y_of(codec, data))[0])
    assert torch.equal(codec.decompress(data), silent)
    torch.nn.init.normal_(codec.unet.out[-1].weight, std=0.1)
    x, lq = torch.randn(2, 1, D, 4, 3, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([2.5])
    torch.testing.assert_close(codec.denoiser(x, t, lq), lq + codec.unet(x, t, lq))
    assert not torch.equal(codec.decompress(data), silent)
    assert torch.equal(plain.denoiser(x, t, lq), plain.unet(x, t, lq))
    with pytest.raises(ValueError, match="needs adapter difference"):
        replace(PARAMS, prediction="correction")


@pytest.mark.parametrize("eta", [math.nan, 0.4], ids=["published", "decoder"])
def test_gradients_reach_all_that_is_trained(eta):
    codec = new_codec()
    stage = CodecStage(
        TrainConfig(networks=PARAMS, codec=CodecStageParams(perceptual="none")), codec, torch.device("cpu")
    )
    image = torch.stack([to_signed(picture(48, 64, seed)) for seed in range(2)])
    out = codec(image, draws(codec, [3, 1], [eta, eta], (D, 3, 4)))
    (out.image.square().mean() + 0.25 * (out.base.z - out.base.z_q.detach()).square().mean()).backward()
    for name, parameter in codec.named_parameters():
        averaged = name.startswith("vq_base.quantize.")  # moved by averages, not by gradients
        if name.startswith("autoencoder.") or averaged:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    trained = {id(p) for p in stage.optimiser.parameters}
    assert trained == {id(p) for n, p in codec.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"eta": 0.0}, {"eta": 1.5}], ids=str)
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
