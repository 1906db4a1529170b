"""The texture network: filters, detail and grain by hand; in a codec, in tiles, in releases."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coding.api import load_codec
from models.bitstream import noise_seed
from models.blocks import finished
from models.light import LightDecoder, LightParams
from models.noise import GRAIN_STEP, normal
from models.records import Sampling
from models.released import load_release, save_triple, start_from_release, states_of
from models.sizes.tiles import CROP, Tiles
from models.stated import meaning
from models.texture import FILTERS, GRAIN, Texture, TextureParams, filters, over_pixels, seen_by
from release.making import write_release
from tests.commands import NANO, ROOT
from tests.residual import D, new_codec, picture
from tests.small_runs import TEXTURE
from training.config import load_config
from training.start import new_codec as new_training
from training.start import start_from
from utils.errors import CheckpointError, ConfigError

SIZE = TextureParams(width=4, num_res_blocks=1)


def with_amounts(gain: dict[int, float], log: float) -> Texture:
    """One that adds the same everywhere: gains by filter, and grain of GRAIN exp(log) by each."""
    texture = Texture(SIZE, D).eval().requires_grad_(False)
    for k, value in gain.items():
        texture.conv_out.bias[k] = value
    texture.conv_out.bias[FILTERS:] = log
    return texture


def inputs(h: int = 4, w: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A picture, a latent and white noise."""
    random = torch.Generator().manual_seed(seed)
    shapes = (1, 3, 16 * h, 16 * w), (1, D, h, w), (1, 256, h, w)
    image, x, noise = (torch.randn(shape, generator=random) for shape in shapes)
    return 0.3 * image, x, noise


def textured(seed: int = 0):
    """A codec whose texture network has a say."""
    codec = new_codec()
    codec.params = replace(codec.params, texture=SIZE)
    torch.manual_seed(seed)
    codec.texture = Texture(SIZE, D).eval().requires_grad_(False)
    torch.nn.init.normal_(codec.texture.conv_out.weight, std=0.1)
    torch.nn.init.constant_(codec.texture.conv_out.bias[FILTERS:], 1.0)
    return codec


# The network ----------------------------------------------------------------------------------------------------------


def test_filters_have_norm_1_and_see_no_flat_colour():
    bank = filters()
    assert bank.shape == (10, 1, 9, 9)
    torch.testing.assert_close(bank.square().sum((1, 2, 3)), torch.ones(FILTERS))
    torch.testing.assert_close(bank.sum((1, 2, 3)), torch.zeros(FILTERS), atol=2e-6, rtol=0)
    assert bank[0, 0, 4, 4].item() == pytest.approx(8 / math.sqrt(72))  # 8/9 and eight times -1/9
    assert bank[0, 0, 3, 3].item() == pytest.approx(-1 / math.sqrt(72)) and bank[0, 0, 2, 4] == 0


@pytest.mark.parametrize("k, length, turns", [(2 + 4 * i + j, (3, 6)[i], j) for i in range(2) for j in range(4)])
def test_waves_see_their_own_direction_and_length_best(k, length, turns):
    """A wave along columns, falling, along rows, rising: of all waves of its length it answers the filter's own most."""
    row, column = torch.meshgrid(*[torch.arange(48.0)] * 2, indexing="ij")
    answers = []
    for i in range(4):
        along = column * math.cos(math.pi * i / 4) + row * math.sin(math.pi * i / 4)
        wave = torch.cos(2 * math.pi * along / length)[None, None]
        answers.append(seen_by(filters()[k : k + 1], wave)[..., 8:-8, 8:-8].square().mean().item())
    assert max(range(4), key=answers.__getitem__) == turns and sorted(answers)[-2] < 0.5 * max(answers)


def test_detail_by_hand():
    """The first filter alone is the sharpening that decoders had before: a (g - m g), of norm sqrt(8) / 3."""
    image, x, noise = inputs()
    out = with_amounts({0: 0.3}, -50.0)(image, x, noise)
    expected = finished(image, 0.3 * 3 / math.sqrt(8), 0.0)
    torch.testing.assert_close(out[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5, rtol=1e-5)
    flat = torch.full_like(image, 0.25)
    torch.testing.assert_close(with_amounts({0: 0.3, 5: 2.0}, -50.0)(flat, x, noise), flat, atol=1e-6, rtol=0)


def test_grain_by_hand():
    """All filters of one noise, GRAIN e^1 of each: the deviation of what is added is that times the norm of their sum."""
    image, x, noise = inputs(16, 16)
    texture = with_amounts({}, 1.0)
    added = texture(image, x, noise) - image
    expected = GRAIN * math.e * filters().sum(0).square().sum().sqrt().item()
    assert added[..., 4:-4, 4:-4].std().item() == pytest.approx(expected, rel=0.02)
    torch.testing.assert_close(added[:, 0], added[:, 2], atol=1e-6, rtol=0)  # grey
    twice = with_amounts({}, 1.0 + math.log(2))(image, x, noise) - image
    torch.testing.assert_close(twice, 2 * added, atol=1e-6, rtol=1e-4)


def test_noise_of_a_latent_position_lies_over_its_pixels_row_by_row():
    image, x, _ = inputs()
    noise = torch.zeros(1, 256, 4, 3)
    noise[0, 16 * 3 + 5, 1, 2] = 1.0  # row 3 and column 5 of the position in row 1 and column 2
    added = (with_amounts({}, 0.0)(image, x, noise) - image)[0, 0]
    assert divmod(added.abs().argmax().item(), 48) == (16 + 3, 32 + 5)
    assert added[:12].abs().max() < 1e-6 < added[15:24].abs().max()


def test_amounts_change_linearly_between_the_middles_of_cells():
    row = over_pixels(torch.tensor([0.0, 8.0]).expand(1, 1, 2, 2))[0, 0, 0]
    assert row.tolist() == [0, 0, 1, 3, 5, 7, 8, 8]


def test_it_reads_the_energy_of_detail_and_the_latent():
    """Detail ten times as strong, or another latent, gives other amounts; gradients reach every parameter."""
    torch.manual_seed(0)
    texture = Texture(SIZE, D)
    torch.nn.init.normal_(texture.conv_out.weight, std=0.3)
    image, x, noise = inputs()
    gains = [texture.amounts(i, seen_by(texture.filters, i.mean(1, keepdim=True)), z)[0] for i, z in
             ((image, x), (10 * image, x), (image, x + 1))]  # fmt: skip
    assert (gains[0] - gains[1]).abs().max() > 0.01 and (gains[0] - gains[2]).abs().max() > 0.01
    texture(image, x, noise).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in texture.parameters())


def test_the_configuration_of_the_small_model_costs_7_gflop():
    networks = load_config(str(ROOT / "configs" / "small-texture.yaml")).networks
    channels = networks.autoencoder.embed_dim
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Texture(networks.texture, channels)(
            torch.empty(1, 3, 512, 768), torch.empty(1, channels, 32, 48), torch.empty(1, 256, 32, 48)
        )
    assert 6.9 < counter.get_total_flops() / 1e9 < 7.1


# In a codec -----------------------------------------------------------------------------------------------------------


def test_a_file_has_one_picture_and_its_grain_has_numbers_of_its_own():
    codec = textured()
    data = codec.compress(picture(48, 64), 40)
    contents = codec.read(data)
    first, again = codec.render(contents).image, codec.render(contents).image
    assert torch.equal(first, again)
    grain = codec.grain(torch.empty(1, D, 3, 4), [contents.file], Sampling())
    assert GRAIN_STEP == 2**31
    assert torch.equal(grain, normal(noise_seed(contents.file.base), 2**31, (256, 3, 4)))
    other = codec.render(contents, Sampling(seed=3, eta=1e-12)).image.int()
    same_noise = codec.render(contents, Sampling(seed=4, eta=1e-12)).image.int()
    assert 0 < (other - same_noise).abs().float().mean() < 12  # diffusion's noise is off: what differs is grain
    batched = codec.render_all([contents, contents])[1].image  # by other kernels on some processors
    assert (batched.int() - first.int()).abs().max() <= 1


def test_shares_of_it_are_added():
    """0: the picture of a codec without; 1/2: halfway, to the rounding of 8 bits; shares out of range are refused."""
    codec, plain = textured(), new_codec()
    contents = codec.read(codec.compress(picture(48, 64), 40))
    none, half, all_ = (codec.render(contents, Sampling(texture=share)).image.float() for share in (0.0, 0.5, 1.0))
    assert torch.equal(none, plain.decompress(plain.compress(picture(48, 64), 40)).float())
    inside = (none.minimum(all_) > 0) & (none.maximum(all_) < 255)
    assert (
        inside.float().mean() > 0.5 and (half - (none + all_) / 2)[inside].abs().max() <= 1 < (none - all_).abs().max()
    )
    for share in (-0.1, 2.1):
        with pytest.raises(ValueError, match=f"texture {share}: 0 .none. to 2"):
            Sampling(texture=share)


def test_it_moves_no_symbol():
    image = picture(48, 64)
    plain, codec = new_codec(), textured()
    for code in (0, 40):
        assert plain.compress(image, code) == codec.compress(image, code)


def test_it_fades_with_the_level():
    """Of three levels, fade 0.6: all of it for the base alone and at level 1, 0.8 at level 2, 0.4 at the last; by file in a batch."""
    codec = textured()
    codec.params = codec.params.with_rules({"fade": 0.6})
    image = picture(48, 64)
    contents = [codec.read(codec.write(codec.analyse(image), code)) for code in (0, 1, 128, 255)]
    shares = codec.texture_shares([each.file for each in contents], Sampling(texture=0.5))
    assert shares.shape == (4, 1, 1, 1) and shares.flatten().tolist() == pytest.approx([0.5, 0.5, 0.4, 0.2])
    together = codec.render_all(contents)
    codec.params = codec.params.with_rules({"fade": 0.0})
    alone = codec.render(contents[3], Sampling(texture=0.4)).image.int()
    assert (
        (together[3].image.int() - alone).abs().max() <= 1 < (alone - codec.render(contents[3]).image.int()).abs().max()
    )


@torch.no_grad()
def test_tiles_have_the_texture_of_the_whole():
    """D is left out: what is compared is texture, and the place that noise has in a tile."""
    codec = textured()
    random = torch.Generator().manual_seed(1)
    x, noise = torch.randn(1, D, 3, CROP, generator=random), torch.randn(1, 256, 3, CROP, generator=random)

    def shown(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        image = x[:, :3].repeat_interleave(16, 2).repeat_interleave(16, 3)
        return codec.texture(image, x, noise)

    small = Tiles(48, 16 * CROP, 64, margin=4)
    assert len(list(small.tiles())) > 4
    torch.testing.assert_close(small.run(shown, x, noise), shown(x, noise), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_light_decoder_has_it_too():
    codec = textured()
    codec.light = LightDecoder(LightParams((4, 2), (1, 1), 1), D).eval()
    torch.nn.init.normal_(codec.light.linear.weight, std=0.05)
    _, x, noise = inputs()
    added = codec.texture(codec.light(x), x, noise)
    torch.testing.assert_close(codec.picture(x, noise, torch.ones(1, 1, 1, 1)), added)
    assert not torch.allclose(added, codec.picture(x), atol=1e-3)


def test_large_pictures_get_it_in_tiles_that_cannot_be_seen():
    """What it adds to a picture of four tiles is what it adds to the whole, but for what D makes of tiles."""
    codec = textured()
    contents = codec.read(codec.compress(picture(128, 128), 0))
    whole = [codec.render(contents, Sampling(texture=share)).image.float() for share in (0.0, 1.0)]
    codec.tile_side = 64
    assert not codec.tiles(128, 128).small
    tiled = [codec.render(contents, Sampling(texture=share)).image.float() for share in (0.0, 1.0)]
    added, expected = ((one - none)[:, 8:-8, 8:-8] for none, one in (tiled, whole))
    assert torch.corrcoef(torch.stack([added.flatten(), expected.flatten()]))[0, 1] > 0.9


def test_memory_counts_the_noise_of_all_pixels():
    """Of a picture in tiles: 5.5 floats per pixel while it is drawn. None of it to encode."""
    codec = textured()
    plain, size = new_codec(), (20_000, 20_000)
    assert codec.memory(*size, "encode") - plain.memory(*size, "encode") == sum(
        p.nbytes for p in codec.texture.parameters()
    )
    assert codec.memory(*size, "decode") >= 5.5 * 4 * 20_000**2


def test_parameters_say_so_and_old_fingerprints_hold():
    plain = new_codec().params
    assert "texture" not in meaning(plain)
    assert meaning(replace(plain, texture=SIZE))["texture"] == {"width": 4, "num_res_blocks": 1}
    assert meaning(replace(plain, texture=replace(SIZE, fade=0.5)))["texture"]["fade"] == 0.5
    with pytest.raises(ConfigError, match="width 0: from 1 up"):
        load_config(str(NANO), [*TEXTURE, "networks.texture.width=0"])


# In releases ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder, codec = tmp_path_factory.mktemp("textured") / "nano", textured()
    codec.residual.train_rates()
    write_release(folder, 3, codec, replace(load_config(str(NANO), TEXTURE), networks=codec.params))
    return folder


def test_a_release_keeps_it_and_its_fingerprint_counts_it(released, tmp_path):
    codec = load_release(released)
    data = codec.compress(image := picture(48, 64), 40)
    ours = textured()
    assert all(torch.equal(v, ours.texture.state_dict()[k]) for k, v in codec.texture.state_dict().items())
    codec.texture.conv_out.bias += 0.5
    config = replace(load_config(str(NANO), TEXTURE), networks=codec.params)
    write_release(tmp_path / "other", 3, codec, config)
    other = load_release(tmp_path / "other")
    assert other.fingerprint != codec.fingerprint and len(other.compress(image, 40)) == len(data)
    assert not torch.equal(other.decompress(other.compress(image, 40)), load_release(released).decompress(data))
    plain = load_codec(released).decompress(data, texture=0.0)
    assert torch.equal(plain, load_release(released).decode(data, Sampling(texture=0.0)).image)
    assert not torch.equal(plain, load_codec(released).decompress(data))


def test_parameters_without_the_network_are_refused(released, tmp_path):
    from models.released import Triple, load_triple

    codec = load_release(released)
    states = {name: state for name, state in states_of(codec).items() if name != "texture"}
    save_triple(Triple.of(tmp_path, 3), states, codec.params)
    with pytest.raises(CheckpointError, match="has no texture network, which the configuration asks for"):
        load_triple(Triple.of(tmp_path, 3))


def test_training_leaves_it_out_or_goes_on_from_it(released):
    sizes = load_release(released).params
    told = {}

    def untrained(size: TextureParams | None):
        config = load_config(str(NANO), TEXTURE if size else ())
        return new_training(replace(config, networks=replace(sizes, texture=size)))

    for size in (None, SIZE):
        codec = untrained(size)
        told[size] = start_from_release(released, codec)
        assert (codec.texture is None) == (size is None)
    assert (
        any("adds texture, which is left out here" in line for line in told[None])
        and ", texture from" not in told[None][0]
    )
    assert not any("texture, which" in line for line in told[SIZE])
    assert all(torch.equal(v, textured().texture.state_dict()[k]) for k, v in codec.texture.state_dict().items())
    with pytest.raises(CheckpointError, match="texture.width 8 for 4"):
        start_from_release(released, untrained(TextureParams(8, 1)))


def test_it_goes_on_from_that_of_another_release(released, tmp_path):
    """Stage decoder leaves texture out, since D is another then: its network need not start from nothing behind the new D."""
    without, bare = new_codec(), tmp_path / "bare"
    without.residual.train_rates()
    write_release(bare, 3, without, replace(load_config(str(NANO)), networks=without.params))
    config = load_config(str(NANO), [*TEXTURE, f"release={bare}", f"texture.start={released}"])
    config = replace(config, networks=replace(without.params, texture=SIZE))
    codec = new_training(config)
    told = start_from(config, codec)
    assert told[-1] == f"texture from {released}" and f"{bare} adds no texture" in told
    assert all(torch.equal(v, textured().texture.state_dict()[k]) for k, v in codec.texture.state_dict().items())
    other = replace(config, networks=replace(config.networks, texture=TextureParams(8, 1)))
    with pytest.raises(ConfigError, match="does not fit the configuration. other shape: picture_in"):
        start_from(other, new_training(other))
    with pytest.raises(ConfigError, match="that release adds no texture"):
        start_from(replace(config, texture=replace(config.texture, start=str(bare))), codec)
