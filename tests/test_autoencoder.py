"""The image autoencoder: sizes, statistics of the latent, patch and shortcut."""

import pytest
import torch
import torch.nn.functional as F

from models.autoencoder import DECODING, ENCODING, Autoencoder, AutoencoderParams, fit_linear
from models.blocks import AttnBlock
from models.codec import Codec
from models.layers.sharing import sharing
from tests.commands import NANO
from training.config import load_config
from utils.errors import ConfigError

PATCHED = dict(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=8, embed_dim=6, groups=4, n_embed=0)
SMALL = PATCHED | dict(ch_mult=(1, 1, 1, 2, 2))


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return Autoencoder(AutoencoderParams(**SMALL | dict(n_embed=32))).eval()


def awake(autoencoder):
    """With last convolutions that are not zero, so that f and g say something beside a linear shortcut."""
    torch.manual_seed(1)
    for last in (autoencoder.encoder.conv_out, autoencoder.decoder.conv_out):
        torch.nn.init.normal_(last.weight, std=0.1)
    return autoencoder.eval()


def picture(height, width, n=1):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(height + width)) * 2 - 1


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (64, 32)], ids=str)
@pytest.mark.parametrize(
    "params",
    [SMALL, PATCHED | dict(patch=4), PATCHED | dict(patch=4, shortcut="linear")],
    ids=["plain", "patch", "linear"],
)
@torch.inference_mode()
def test_sizes(params, size):
    autoencoder = awake(Autoencoder(AutoencoderParams(**params)))
    image = picture(*size, n=2)
    x = autoencoder.encode(image)
    assert x.shape == (2, 6, size[0] // 16, size[1] // 16)
    assert autoencoder.decode(x).shape == image.shape and torch.equal(autoencoder(image), autoencoder.decode(x))
    coarse = autoencoder.decode_coarse(x)
    assert coarse.shape[2:] == x.shape[2:] and torch.equal(autoencoder.decode_fine(coarse, x), autoencoder.decode(x))


@pytest.mark.parametrize(
    ("params", "reach"),
    [  # by hand: two convolutions of each of two blocks and one of the doubling, at every resolution, and the last one
        (PATCHED | dict(patch=4), 5 / 2 + 5 / 4 + 1 / 4),
        (SMALL, 5 / 2 + 5 / 4 + 5 / 8 + 5 / 16 + 1 / 16),
    ],
    ids=["patch", "plain"],
)
@torch.inference_mode()
def test_a_pixel_depends_on_maps_of_the_latent_as_far_as_told(params, reach):
    """Exactly so far, where norms have what they share: of a change at one position all pixels up to there change."""
    decoder = awake(Autoencoder(AutoencoderParams(**params))).double().decoder
    assert decoder.fine_reach == reach
    for block in (m for part in decoder.up for m in part.block):
        torch.nn.init.normal_(block.conv2.weight)
    patch = params.get("patch", 1)
    h = torch.randn(1, decoder.up[-1].block[-1].conv2.out_channels, 1, 21, dtype=torch.float64)
    changed = h.clone()
    changed[..., 10] += 1
    with sharing():
        found = (decoder(h, only="fine") != decoder(changed, only="fine")).any((0, 1, 2)).nonzero()
    step = patch / 16  # latent positions of a value
    assert found.min() * step == 10 - reach and (found.max() + 1) * step == 11 + reach


@pytest.mark.parametrize("shortcut", ["none", "linear"])
@pytest.mark.parametrize("scale", [None, 2.5], ids=["per channel", "one for all"])
@torch.inference_mode()
def test_folded_statistics(shortcut, scale):
    """Zero mean and unit variance per channel, or one scale that keeps their order; D(E(X)) stays what it was."""
    autoencoder = awake(Autoencoder(AutoencoderParams(**SMALL, shortcut=shortcut))).double()
    autoencoder.quant_conv.bias.copy_(torch.linspace(-20, 20, 6))
    autoencoder.quant_conv.weight.mul_(torch.linspace(0.5, 30, 6).view(-1, 1, 1, 1))
    image = picture(128, 160, n=2).double()
    x, restored = autoencoder.encode(image), autoencoder(image)
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)
    assert mean.abs().max() > 5 and (std - 1).abs().max() > 0.5  # there is something to fold
    divisor = std if scale is None else torch.full((6,), scale).double()
    autoencoder.fold_statistics(mean, divisor)
    folded, shape = autoencoder.encode(image), (1, -1, 1, 1)
    torch.testing.assert_close(folded, (x - mean.view(shape)) / divisor.view(shape), rtol=0, atol=1e-9)
    torch.testing.assert_close(folded.mean((0, 2, 3)), torch.zeros(6).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(folded.std((0, 2, 3), correction=0), std / divisor, rtol=1e-9, atol=0)
    torch.testing.assert_close(autoencoder(image), restored, rtol=0, atol=1e-9)


def test_without_code_book_there_are_no_keys_of_one():
    keys = Autoencoder(AutoencoderParams(**SMALL)).state_dict().keys()
    assert not [key for key in keys if key.startswith("quantize")]
    with_book = Autoencoder(AutoencoderParams(**SMALL | dict(n_embed=32)))
    assert with_book.state_dict().keys() - keys == {"quantize.embedding.weight"}
    assert not with_book.quantize.embedding.weight.requires_grad


@pytest.mark.parametrize("size", [(17, 31), (16, 16), (33, 64), (50, 18)], ids=str)
@torch.inference_mode()
def test_pictures_are_padded_by_edge_values_right_and_bottom(size):
    torch.manual_seed(0)
    codec = Codec(load_config(str(NANO)).networks).eval()
    height, width = size
    image = picture(height, width)
    rows = torch.arange(-(-height // 16) * 16).clamp(max=height - 1)
    columns = torch.arange(-(-width // 16) * 16).clamp(max=width - 1)
    x = codec.to_latent(image)
    assert x.shape[2:] == (-(-height // 16), -(-width // 16))
    assert torch.equal(x, codec.autoencoder.encode(image[:, :, rows][..., columns]))


def test_the_signal_and_its_gradient_cross_an_untrained_network():
    """start_linear: what PyTorch's own start divides by about 1.7 at every convolution keeps its size."""
    torch.manual_seed(0)
    network = Autoencoder(AutoencoderParams(**SMALL | dict(ch=16, z_channels=32, embed_dim=32)))
    image = picture(64, 64, n=4).requires_grad_()
    x = network.encode(image)
    assert 0.3 < x.std() < 3
    restored = network.decode(x)
    assert 0.3 < restored.std() < 3
    (restored * torch.randn_like(restored)).sum().backward()
    assert 0.1 < network.encoder.conv_in.weight.grad.norm() / network.decoder.conv_in.weight.grad.norm() < 30


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 4)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_attention_is_given_dense_rows(monkeypatch, size, layout):
    """A single position included, whose head stride of 1 no memory-efficient kernel of CUDA takes."""
    block, given = AttnBlock(8, groups=4), []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv, attn_mask: given.extend(qkv) or attention(*qkv))
    block(torch.randn(2, 8, *size).contiguous(memory_format=layout))
    positions = size[0] * size[1]
    assert [(t.shape, t.stride()) for t in given] == [((2, 1, positions, 8), (8 * positions, 8 * positions, 8, 1))] * 3


# patch and shortcut -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_without_patch_and_shortcut_it_is_the_published_network(autoencoder):
    image = picture(48, 32)
    x = autoencoder.encode(image)
    assert torch.equal(x, autoencoder.quant_conv(autoencoder.encoder(image)))
    assert torch.equal(autoencoder.decode(x), autoencoder.decoder(autoencoder.post_quant_conv(x)))
    assert not [key for key in autoencoder.state_dict() if key.startswith("shortcut")]
    assert autoencoder.encoder.conv_in.weight.shape == (8, 3, 3, 3)


@pytest.mark.parametrize("common", [False, True])
def test_noise_on_the_latent_is_scaled_to_its_deviation(monkeypatch, common):
    """Of each channel or of all, over the whole batch: (0, 2), (0, 4) and (0, 8); the deviation is told, not learnt."""
    autoencoder = Autoencoder(AutoencoderParams(**SMALL))
    x = (torch.tensor([2.0, 4.0, 8.0]).view(1, 3, 1, 1) * torch.arange(2.0).view(2, 1, 1, 1)).requires_grad_()
    monkeypatch.setattr(autoencoder, "encode", lambda image: x)
    monkeypatch.setattr(autoencoder, "decode", lambda x: x)
    noise = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.0]]).view(2, 3, 1, 1)
    # Bessel's: (a / 2)^2 * 2 = a^2 / 2 of two numbers; of all six, mean 14 / 6: (84 - 6 * (14 / 6)^2) / 5 = 10.266667
    deviation = torch.tensor([10.266667] * 3 if common else [2.0, 8.0, 32.0]).sqrt().view(1, 3, 1, 1)
    noisy = autoencoder(torch.zeros(2, 3, 16, 16), noise, common)
    torch.testing.assert_close(noisy, x + noise * deviation)
    noisy.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@torch.inference_mode()
def test_a_patch_is_folded_into_channels_and_back():
    """Channel c p^2 + p i + j holds the pixel (i, j) of every cell of p x p."""
    autoencoder = Autoencoder(AutoencoderParams(**PATCHED, patch=4))
    image = picture(16, 32)
    folded = torch.stack([image[:, c, i::4, j::4] for c in range(3) for i in range(4) for j in range(4)], 1)
    seen = []
    autoencoder.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    autoencoder.encode(image)
    assert torch.equal(seen[0], folded)
    autoencoder.decoder.forward = lambda z: folded
    assert torch.equal(autoencoder.decode(torch.zeros(1, 6, 1, 2)), image)


def test_a_patch_is_a_power_of_two():
    with pytest.raises(ValueError, match="patch 3: a power of two"):
        AutoencoderParams(patch=3)


def blocks_of_known_variance():
    """Pictures 2 x 3 x 128 x 128 whose 16x16 blocks vary along nine orthonormal directions with deviations 0.9 to 0.1.

    Returns them, the directions (9, 768) and the mean (768,).
    """
    random = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    mean, directions = draw(768) / 10, torch.linalg.qr(draw(768, 9)).Q.T
    c = draw(128, 9)
    c = torch.linalg.qr(c - c.mean(0)).Q * 128**0.5  # mean 0 and covariance 1, exactly
    blocks = mean + c * torch.arange(9, 0, -1) / 10 @ directions
    image = torch.empty(2, 3, 128, 128)
    for n, block in enumerate(blocks):
        i, j = n // 8 % 8 * 16, n % 8 * 16
        image[n // 64, :, i : i + 16, j : j + 16] = block.view(3, 16, 16)
    return image, directions, mean


@torch.inference_mode()
def test_the_shortcut_is_fitted_to_the_principal_components():
    image, directions, mean = blocks_of_known_variance()
    autoencoder = Autoencoder(AutoencoderParams(**SMALL, shortcut="linear")).eval()
    variances = fit_linear(autoencoder, image.split(1))
    assert variances.shape == (768,)
    known = torch.zeros(768, dtype=torch.float64)
    known[:9] = torch.arange(9, 0, -1) ** 2 / 100
    torch.testing.assert_close(variances, known, rtol=0, atol=1e-6)

    restored = autoencoder(image)  # 6 of 9 directions are kept: 0.3, 0.2 and 0.1 are lost
    assert (restored - image).square().mean().item() == pytest.approx((0.09 + 0.04 + 0.01) / 768, rel=1e-4)
    w = autoencoder.shortcut.analysis.weight.flatten(1)
    scale = ((0.81 + 0.64 + 0.49 + 0.36 + 0.25 + 0.16) / 6) ** 0.5
    torch.testing.assert_close((w * scale @ directions.T.float()).abs(), torch.eye(6, 9), rtol=0, atol=1e-4)
    assert (w.amax(1) == w.abs().amax(1)).all()  # the sign that is agreed upon
    back = autoencoder.shortcut.synthesis
    torch.testing.assert_close(back.weight.flatten(1), w.T * scale**2)
    torch.testing.assert_close(back.bias, mean.float())

    x = autoencoder.encode(image)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.arange(9.0, 3, -1) / 10 / scale, rtol=1e-4, atol=0)


def test_a_shortcut_needs_more_than_one_colour():
    with pytest.raises(ConfigError, match="one colour"):
        fit_linear(Autoencoder(AutoencoderParams(**PATCHED, patch=4, shortcut="linear")), [torch.ones(1, 3, 16, 16)])


def test_the_first_gradient_reaches_the_last_convolutions():
    """They start at zero: before the first step there is the linear map alone. (Its squared error would move f by
    nothing: the error of a projection is orthogonal to what it keeps.)"""
    autoencoder = Autoencoder(AutoencoderParams(**PATCHED, patch=4, shortcut="linear"))
    image, *_ = blocks_of_known_variance()
    fit_linear(autoencoder, [image])
    restored = autoencoder(image)
    linear = autoencoder.shortcut
    assert torch.equal(restored, linear.decode(linear.encode(image)))
    (restored - image).abs().mean().backward()
    for network in (autoencoder.encoder, autoencoder.decoder):
        assert not network.conv_out.weight.any()
        assert network.conv_out.weight.grad.norm() > 1e-4
        assert not network.conv_in.weight.grad.any()


def test_the_shortcut_keeps_its_precision_under_autocast():
    autoencoder = Autoencoder(AutoencoderParams(**PATCHED, patch=4, shortcut="linear")).eval()
    image = picture(32, 32)
    with torch.inference_mode():
        restored = autoencoder(image)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(autoencoder(image), restored)


def test_every_parameter_is_of_e_or_of_d():
    """By the starts of its name; those of D are what `decoding` gives, the linear map's among them."""
    autoencoder = Autoencoder(AutoencoderParams(ch=8, ch_mult=(1, 1, 1, 1, 1), groups=4, n_embed=0, shortcut="linear"))
    named = dict(autoencoder.named_parameters())
    e, d = ({name for name in named if name.startswith(half)} for half in (ENCODING, DECODING))
    assert not e & d and e | d == named.keys()
    of_d = {id(p) for part in autoencoder.decoding() for p in part.parameters()}
    assert {id(named[name]) for name in d} == of_d
