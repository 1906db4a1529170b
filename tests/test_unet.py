"""The denoiser at any latent size, batch and time."""

import pytest
import torch

from models.unet import ResBlock, UNet, UNetParams, timestep_embedding

PARAMS = UNetParams(
    latent_channels=6,
    condition_channels=5,
    condition_width=2,
    model_channels=16,
    channel_mult=(1, 1, 1, 2),
    num_res_blocks=1,
    swin_embed_dim=16,
    head_channels=8,
    mlp_ratio=1,
    groups=4,
)


@pytest.fixture(scope="module")
def unet():
    """With the layers that start at zero filled in, so that every branch acts."""
    torch.manual_seed(0)
    net = UNet(PARAMS).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, ResBlock):
            torch.nn.init.normal_(module.out_layers[3].weight, std=0.1)
    return net


def inputs(height, width, n=1, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, PARAMS.latent_channels, height, width, generator=random)
    lq = torch.randn(n, PARAMS.condition_channels, height, width, generator=random)
    return x, torch.rand(n, generator=random), lq


def test_published_sizes_need_multiples_of_16():
    assert UNetParams().size_multiple == 16
    assert PARAMS.size_multiple == 16
    assert UNetParams(windows=(4, 4, 4, 4)).size_multiple == 32


@pytest.mark.parametrize("size", [(1, 1), (1, 16), (16, 9), (16, 32), (20, 37)], ids=str)
def test_size_is_kept_by_padding_with_edge_values_right_and_bottom(unet, size):
    height, width = size
    x, t, lq = inputs(height, width)
    rows = torch.arange(-(-height // 16) * 16).clamp(max=height - 1)
    columns = torch.arange(-(-width // 16) * 16).clamp(max=width - 1)
    out, padded = unet(x, t, lq), unet(x[:, :, rows][..., columns], t, lq[:, :, rows][..., columns])
    assert torch.equal(out, padded[:, :, :height, :width]) and out.shape == (1, PARAMS.latent_channels, *size)
    assert out.isfinite().all() and out.std() > 0


@pytest.mark.parametrize("size", [(16, 16), (5, 18)], ids=str)
def test_a_batch_of_two_is_two_of_one(unet, size):
    x, t, lq = inputs(*size, n=2)
    together = unet(x, t, lq)
    for i in range(2):
        alone = unet(x[i : i + 1], t[i : i + 1], lq[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_times_are_real_numbers(unet):
    x, _, lq = inputs(16, 16)
    at = {time: unet(x, torch.tensor([time]), lq) for time in (0.0, 0.5, 1.0)}
    whole = unet(x, torch.tensor([1]), lq)
    assert torch.equal(at[1.0], whole)
    for other in (0.0, 1.0):
        assert (at[0.5] - at[other]).abs().max() > 1e-4
    near = unet(x, torch.tensor([0.5 + 1e-5]), lq)
    assert (near - at[0.5]).abs().max() < 1e-3
    assert timestep_embedding(torch.tensor([0.5]), 16).dtype == torch.float32


def test_a_condition_of_half_the_size_is_doubled(unet):
    x, t, _ = inputs(20, 36)
    lq = inputs(10, 18, seed=1)[2]
    expected = unet(x, t, lq.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert torch.equal(unet(x, t, lq), expected)


def test_the_last_layer_makes_the_prediction():
    """Each of its rows belongs to a channel; off, nothing but the bias is left."""
    unet = UNet(PARAMS)
    assert unet.last_layer is unet.out[-1].weight and len(unet.last_layer) == PARAMS.latent_channels
    unet.start_silent()
    assert not unet(*inputs(16, 16)).any() and not unet.last_layer.any()


def test_residual_blocks_start_as_the_identity():
    torch.manual_seed(0)
    blocks = [m for m in UNet(PARAMS).modules() if isinstance(m, ResBlock)]
    assert len(blocks) == 4 + 2 + 8
    for block in blocks:
        channels = block.in_layers[0].num_channels
        x, emb = torch.randn(2, channels, 4, 4), torch.randn(2, block.emb_layers[1].in_features)
        assert torch.equal(block(x, emb), block.skip_connection(x))
