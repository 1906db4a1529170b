"""A wider latent: channels that a release gains before it is trained on."""

from dataclasses import replace

import pytest
import torch

from datapipe.pictures import Batch
from models.autoencoder import Autoencoder, AutoencoderParams, fit_linear
from models.codec import Codec
from models.records import CodecParams
from models.released import start_from_release
from release.making import write_release
from tests.commands import NANO
from tests.networks import off_zero
from tests.residual import SMALL as RESIDUAL
from tests.residual import new_codec
from tests.small_runs import LIGHT
from tests.stages import pictures
from training.config import load_config
from training.gt_stage import GtStage
from training.start import start_from
from utils import checkpoints
from utils.errors import CheckpointError, ConfigError

D, WIDER = 8, 11  # channels of the latent, before and now
M = RESIDUAL.channels


def with_channels(params: CodecParams, d: int, m: int) -> CodecParams:
    return replace(
        params,
        autoencoder=replace(params.autoencoder, embed_dim=d),
        vq_base=replace(params.vq_base, in_channels=d),
        unet=replace(params.unet, latent_channels=d),
        residual=replace(params.residual, channels=m),
    )


@pytest.fixture(scope="module")
def released():
    params = new_codec().params
    params = replace(
        params,
        autoencoder=replace(params.autoencoder, shortcut="linear"),
        vq_base=replace(params.vq_base, shortcut="linear"),
    )
    torch.manual_seed(0)
    codec = Codec(params)
    off_zero(codec)
    codec.residual.train_rates()
    torch.nn.init.normal_(codec.residual.log_gain)
    return codec.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, released):
    folder = tmp_path_factory.mktemp("release")
    write_release(folder, 7, released, replace(load_config(str(NANO)), networks=released.params))
    return folder


@pytest.fixture(scope="module")
def grown(folder, released):
    torch.manual_seed(1)
    codec = Codec(with_channels(released.params, WIDER, M + 2))
    codec.residual.train_rates()
    told = start_from_release(folder, codec)
    assert told[1:] == [f"{folder} has {D} latent channels for {WIDER}: it codes as before with the new ones at zero"]
    return codec.eval().requires_grad_(False)


def test_everything_that_was_there_computes_as_before(released, grown):
    image, k = pictures(2), torch.randint(released.params.vq_base.codebook_size, (2, 4, 4))
    x, wide = released.autoencoder.encode(image), grown.autoencoder.encode(image)
    new = torch.randn(2, WIDER - D, *x.shape[2:])

    def alike(ours: torch.Tensor, theirs: torch.Tensor, channels: int) -> None:
        torch.testing.assert_close(ours[:, :channels], theirs, rtol=1e-4, atol=1e-5)
        assert not ours[:, channels:].any()

    alike(wide, x, D)
    wide = torch.cat([x, new], dim=1)  # what E will say once it has been fitted: nothing there listens to it yet
    torch.testing.assert_close(grown.autoencoder.decode(wide), released.autoencoder.decode(x))
    ours, theirs = grown.vq_base(wide), released.vq_base(x)
    assert torch.equal(ours.indices, theirs.indices)
    alike(grown.vq_base.reconstruct(ours.z_q), released.vq_base.reconstruct(theirs.z_q), D)
    t = torch.tensor([0.5, 1.0])
    alike(grown.unet(wide, t, ours.z_q), released.unet(x, t, theirs.z_q), D)

    ours, theirs = grown.residual, released.residual
    x, k = torch.randn(2, D, 4, 4), torch.randint(16, (2, 4, 4))
    y, s = torch.randn(2, D, 4, 4), torch.randn(2, M, 4, 4)
    wide_x, wide_y, wide_s = (torch.cat([v, torch.randn(2, n, 4, 4)], dim=1) for v, n in ((x, 3), (y, 3), (s, 2)))
    level = torch.tensor([1.0, 2.5])
    torch.testing.assert_close(ours.analysis(wide_x, wide_y)[:, :M], theirs.analysis(x, y))
    torch.testing.assert_close(ours.synthesis(wide_s, wide_y)[:, :D], theirs.synthesis(s, y))
    z = theirs.centred(s)
    torch.testing.assert_close(ours.centred(wide_s), z)
    index = ours.scale_network(z.round(), k)
    assert torch.equal(index[:, :M], theirs.scale_network(z.round(), k)) and (index[:, M:] == 4).all()
    alike(ours.mean_network(z, k, wide_y), theirs.mean_network(z, k, y), M)
    torch.testing.assert_close(ours.gain(level)[:, :M], theirs.gain(level))
    torch.testing.assert_close(ours.gain(level)[:, M:].log(), theirs.gain(level).log().mean(1, True).expand(2, 2, 1, 1))


def test_the_residual_codec_passes_new_channels_on(grown):
    """s's two new channels are the latent's first two new ones, both ways."""
    r, y = torch.zeros(1, WIDER, 2, 2), torch.zeros(1, WIDER, 2, 2)
    r[:, D], r[:, D + 1] = 1.5, -2.0
    still = torch.zeros_like(r)
    s = grown.residual.analysis(r, y) - grown.residual.analysis(still, y)
    assert s[0, M].eq(1.5).all() and s[0, M + 1].eq(-2.0).all()
    back = grown.residual.synthesis(s, y) - grown.residual.synthesis(torch.zeros_like(s), y)
    assert back[0, D].eq(1.5).all() and back[0, D + 1].eq(-2.0).all() and not back[0, D + 2].any()


def test_an_image_autoencoder_takes_the_place_of_the_releases(folder, released, tmp_path):
    """As stage gt has trained it on, in a run of its own; stage light distils a release as it is."""
    state = {key: value + 1 for key, value in released.autoencoder.state_dict().items()}
    checkpoints.save(tmp_path / "gt.pth", {"state_dict": state})
    config = load_config(str(NANO), ["stages=[codec]", f"release={folder}", f"autoencoder={tmp_path / 'gt.pth'}"])
    codec = Codec(released.params)
    codec.residual.train_rates()
    assert len(start_from(config, codec)) == 2
    assert all(torch.equal(value, state[key]) for key, value in codec.autoencoder.state_dict().items())
    assert torch.equal(codec.unet.out[2].weight, released.unet.out[2].weight)
    with pytest.raises(ConfigError, match="release is a whole codec: leave out autoencoder"):
        load_config(str(NANO), [*LIGHT, "release=folder", "autoencoder=gt.pth"])


def test_what_cannot_be_a_wider_latent_is_refused(folder, released):
    none = replace(released.params.autoencoder, shortcut="none")
    with pytest.raises(ConfigError, match="wider than the release's needs a linear shortcut"):
        start_from_release(folder, Codec(with_channels(replace(released.params, autoencoder=none), WIDER, M)))
    with pytest.raises(CheckpointError, match="of other networks: autoencoder.embed_dim 7 for 8"):
        start_from_release(folder, Codec(with_channels(released.params, 7, M)))


def test_new_channels_are_principal_components_of_what_is_lacking():
    """Blocks along four orthogonal directions, with deviations 8, 4, 2 and 1: two channels hold the first two, so that the
    third and fourth get the others, and nothing is left."""
    directions = torch.linalg.qr(torch.randn(768, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    blocks = torch.cat([signs, -signs]) * torch.tensor([8.0, 4, 2, 1]) @ directions.T + 0.25
    image = blocks.view(8, 3, 16, 16).float()

    size = dict(ch=4, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, z_channels=4, n_embed=0, groups=2, shortcut="linear")
    narrow = Autoencoder(AutoencoderParams(embed_dim=2, **size)).eval()
    fit_linear(narrow, [image])
    wide = Autoencoder(AutoencoderParams(embed_dim=4, **size)).eval()
    for ours, theirs in zip(wide.shortcut.parameters(), narrow.shortcut.parameters(), strict=True):
        ours.data.zero_()
        ours.data[tuple(map(slice, theirs.shape))] = theirs.data
    with torch.inference_mode():
        lacking = (wide(image) - image).square().mean().item()
        assert lacking == pytest.approx((4 + 1) / 768, rel=1e-4)
        variances = fit_linear(wide, image.split(3), kept=2)
        torch.testing.assert_close(variances[:3], torch.tensor([4.0, 1, 0], dtype=torch.float64), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(wide(image), image, rtol=0, atol=1e-4)
        x = wide.encode(image)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    scale = ((64 + 16) / 2) ** 0.5  # that of the two which were there
    torch.testing.assert_close(x.std((0, 2, 3), correction=0) * scale, torch.tensor([8.0, 4, 2, 1]))


def test_stage_gt_fits_the_channels_that_were_gained_alone():
    options = ["networks.autoencoder.shortcut=linear", "gt.latent_scale=kept", "gt.crop_size=32"]
    config = load_config(str(NANO), [*options, "speed.precision=float32"])
    codec, device = Codec(config.networks), torch.device("cpu")
    batches = [Batch(pictures(8), torch.arange(8))]
    whole = GtStage(config, codec, device)
    whole.begin(batches)
    assert whole.fitted == 0
    with torch.no_grad():
        codec.autoencoder.shortcut.analysis.weight[6:] = 0
        codec.autoencoder.shortcut.synthesis.weight[:, 6:] = 0
    before = {key: value.clone() for key, value in codec.autoencoder.state_dict().items()}
    grown = GtStage(replace(config, release="folder"), codec, device)
    assert grown.fitted == 6 and grown.begins
    assert "in 2 channels beside the 6 that were there" in grown.begin(batches)
    after = {key: value.clone() for key, value in codec.autoencoder.state_dict().items()}
    changed = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert changed == ["shortcut.analysis.weight", "shortcut.analysis.bias", "shortcut.synthesis.weight"]
    rows = after[changed[0]]
    assert torch.equal(rows[:6], before[changed[0]][:6]) and rows[6:].flatten(1).any(1).all()
    grown.finish([])  # a latent that a codec was trained on stays as it is
    assert all(torch.equal(value, after[key]) for key, value in codec.autoencoder.state_dict().items())
