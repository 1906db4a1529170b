"""The image autoencoder: sizes, statistics of the latent, VQGAN's own quantiser."""

import pytest
import torch
import torch.nn.functional as F

from models.autoencoder import COMMITMENT, Autoencoder, AutoencoderParams
from models.blocks import AttnBlock
from models.codec import Codec
from tests.commands import NANO
from training.config import load_config

SMALL = dict(ch=8, ch_mult=(1, 1, 1, 2, 2), num_res_blocks=1, z_channels=8, embed_dim=6, groups=4)


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return Autoencoder(AutoencoderParams(**SMALL, n_embed=32)).eval()


def picture(height, width, n=1):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(height + width)) * 2 - 1


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (64, 32)], ids=str)
@torch.inference_mode()
def test_sizes(autoencoder, size):
    image = picture(*size, n=2)
    x = autoencoder.encode(image)
    assert x.shape == (2, 6, size[0] // 16, size[1] // 16)
    restored = autoencoder(image)
    assert restored.shape == image.shape
    assert torch.equal(restored, autoencoder.decode(x))


def test_downsampling_follows_the_resolutions():
    assert AutoencoderParams().downsampling == 16
    assert AutoencoderParams(ch_mult=(1, 2, 4)).downsampling == 4


@torch.inference_mode()
def test_folded_statistics(autoencoder):
    """Zero mean and unit variance per channel afterwards; D(E(X)) stays what it was."""
    autoencoder.quant_conv.bias.copy_(torch.linspace(-20, 20, 6))
    autoencoder.quant_conv.weight.mul_(torch.linspace(0.5, 30, 6).view(-1, 1, 1, 1))
    image = picture(128, 160, n=2)
    x, restored = autoencoder.encode(image), autoencoder(image)
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)
    assert mean.abs().max() > 5 and (std - 1).abs().max() > 0.5  # there is something to fold
    autoencoder.fold_statistics(mean, std)
    folded = autoencoder.encode(image)
    torch.testing.assert_close(folded.mean((0, 2, 3)), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(folded.std((0, 2, 3), correction=0), torch.ones(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(folded, (x - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(autoencoder(image), restored, rtol=0, atol=1e-5)


def test_without_code_book_there_are_no_keys_of_one():
    keys = Autoencoder(AutoencoderParams(**SMALL, n_embed=0)).state_dict().keys()
    assert not [key for key in keys if key.startswith("quantize")]
    with_book = Autoencoder(AutoencoderParams(**SMALL, n_embed=32))
    assert with_book.state_dict().keys() - keys == {"quantize.embedding.weight"}
    assert not with_book.quantize.embedding.weight.requires_grad


def test_quantiser(autoencoder):
    codes = autoencoder.quantize.embedding.weight.data.normal_()
    x = torch.randn(2, 6, 3, 5, requires_grad=True)
    quantized = autoencoder.quantise(x)
    assert quantized.z.shape == x.shape and quantized.indices.shape == (2 * 3 * 5,)
    vectors = x.detach().permute(0, 2, 3, 1).reshape(-1, 6)
    distance = torch.cdist(vectors.double(), codes.double())
    assert torch.equal(quantized.indices, distance.argmin(1))
    rows = codes[quantized.indices].view(2, 3, 5, 6).permute(0, 3, 1, 2)
    torch.testing.assert_close(quantized.z.detach(), rows, rtol=0, atol=1e-6)
    torch.testing.assert_close(quantized.loss.detach(), F.mse_loss(rows, x.detach()) * (1 + COMMITMENT))
    weights = torch.randn_like(x)
    (quantized.z * weights).sum().backward()
    assert torch.equal(x.grad, weights)  # straight through


def test_commitment_moves_the_latent_towards_its_code(autoencoder):
    autoencoder.quantize.embedding.weight.data.normal_()
    x = torch.randn(1, 6, 4, 4, requires_grad=True)
    quantized = autoencoder.quantise(x)
    quantized.loss.backward()
    expected = 2 * COMMITMENT * (x - quantized.z).detach() / x.numel()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-7)


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
    network = Autoencoder(AutoencoderParams(**{**SMALL, "ch": 16, "z_channels": 32, "embed_dim": 32}, n_embed=0))
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
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: given.extend(qkv) or attention(*qkv))
    block(torch.randn(2, 8, *size).contiguous(memory_format=layout))
    positions = size[0] * size[1]
    assert [(t.shape, t.stride()) for t in given] == [((2, 1, positions, 8), (8 * positions, 8 * positions, 8, 1))] * 3


def test_residual_branches_start_at_zero(autoencoder):
    middle, h = autoencoder.encoder.mid, torch.randn(1, 16, 5, 7)
    assert torch.equal(middle(h), h)
