"""Indices of the base chosen for distortion and rate together: by hand, and in files."""

import copy
import json

import numpy as np
import pytest
import torch
from skimage import data

import reproduce
from coding import options
from coding.api import load_codec
from models.bitstream import WHOLE
from models.codec import RATE_WEIGHT
from models.index_model import IndexModel, IndexNetwork
from models.vq_base import Codebook, VQBaseParams
from tests.commands import call
from tests.residual import new_codec
from utils.errors import CheckpointError
from utils.images import write_image


@pytest.fixture(scope="module")
def codec():
    return load_codec()


@pytest.fixture(scope="module")
def image():
    return torch.from_numpy(data.astronaut()[:192, 100:356]).permute(2, 0, 1).contiguous()


def weighted(model, weight):
    """The same networks, with `rdo`."""
    model = copy.copy(model)
    model.choose_by_rate(weight)
    return model


def test_a_code_is_taken_while_its_bits_are_worth_more_than_its_distance():
    """Code 0 is four bits cheaper than any other, everywhere."""
    network = IndexNetwork(4, channels=2, wide=4, narrow=4)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    network.out.bias.data[0] = 4
    model = IndexModel(network)
    assert np.ptp(model.bits(np.array([[0, 1]]))) == pytest.approx(4, abs=1e-4)
    codebook = torch.tensor([[0.0, 0], [3, 0], [0, 3], [9, 9]])
    z = torch.tensor([[2.0, 0]]).expand(5, 6, 2).permute(2, 0, 1)  # 4 from code 0, 1 from code 1: 3 / 4 a bit
    for weight, code in ((0, 1), (0.74, 1), (0.76, 0), (9, 0)):
        k, section = model.choose(z, codebook, weight)
        assert (k == code).all() and section == model.encode(k), weight


def test_the_context_of_an_index_is_what_was_chosen_before_it(codec):
    """What is chosen is the best at every position, given all that is chosen in earlier passes."""
    model, book = codec.model.index_model, codec.model.vq_base.quantize.embedding.weight
    z = torch.randn(16, 7, 9, generator=torch.Generator().manual_seed(0))
    k, section = model.choose(z, book, 0.5)
    assert section == model.encode(k)
    random = np.random.default_rng(0)
    for row, column in np.ndindex(k.shape):
        costs = []
        for code in (k[row, column], *random.choice(k.ravel(), 4)):
            other = k.copy()
            other[row, column] = code
            distance = (z[:, row, column] - book[code]).square().sum().item()
            costs.append(distance + 0.5 * model.bits(other)[row, column])
        assert min(costs) > costs[0] - 1e-4, (row, column)


def test_the_spacing_of_a_code_book_by_hand():
    book = Codebook(VQBaseParams(codebook_size=4, embed_dim=1))
    book.embedding.weight.data = torch.tensor([[0.0], [3], [10], [30]])  # 9, 9, 49, 400
    assert book.spacing == 9  # of the two in the middle PyTorch's median is the lower


def test_more_weight_gives_a_base_file_further_from_the_picture(codec, image):
    model = codec.model
    found = [weighted(model, weight).analyse(image) for weight in (0, 0.05, 0.2, 1.0)]
    plain, z = found[0], model.vq_base.encode(found[0].x)
    sizes = [len(model.write(each, 0)) for each in found]
    errors = [(model.vq_base.rows(each.k) - z).square().sum(1).mean().item() for each in found]
    assert sizes == sorted(set(sizes), reverse=True) and errors == sorted(set(errors))
    for each in found:
        contents = model.read(model.write(each, 100))
        assert torch.equal(contents.k, each.k)
    # The residual is of the y that the decoder has.
    worse = model.analysed(*image.shape[1:], WHOLE, plain.x, found[3].k, [None], plain.y, plain.s)
    error = [
        (model.known([model.read(model.write(each, 255))])[0] - plain.x).square().mean() for each in (found[3], worse)
    ]
    assert error[0] < error[1]


def test_the_help_names_the_usual_weight(capsys):
    with pytest.raises(SystemExit):
        options.parse(["--help"])
    assert f"(default: {RATE_WEIGHT:g};" in " ".join(capsys.readouterr().out.split())


def test_the_command_takes_a_weight(image, tmp_path, capsys):
    write_image(tmp_path / "photo.png", image)
    sizes = []
    for name, flags in (("a", ["--rdo", "0"]), ("b", []), ("c", ["--rdo", "0.2"]), ("d", ["--quality", "60"])):
        where = tmp_path / name
        status, out, err = call(capsys, "-i", tmp_path / "photo.png", "-o", where, "--mode", "compress", *flags)
        assert status == 0, err
        sizes.append((where / "photo.dfo").stat().st_size)
    assert sizes[2] < sizes[1] < sizes[0] < sizes[3]
    for flags, said in (
        (["--rdo", "-1"], "a weight from 0"),
        (["--mode", "decompress", "--rdo", "0"], "--rdo goes with"),
    ):
        status, out, err = call(capsys, "-i", tmp_path / "photo.png", "-o", tmp_path / "d", *flags)
        assert status == 2 and said in err


def test_what_cannot_be_is_told(codec, image):
    with pytest.raises(ValueError, match="rdo -1: a weight from 0"):
        load_codec(rdo=-1)
    without = new_codec()
    without.choose_by_rate()
    assert without.rdo == 0
    with pytest.raises(CheckpointError, match="no index model"):
        without.choose_by_rate(0.1)


def test_rates_shows_both(image, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    write_image(tmp_path / "pictures" / "photo.png", image)
    given = [
        "rates",
        "--data",
        tmp_path / "pictures",
        "-o",
        tmp_path / "o",
        "--qualities",
        "0",
        "--codecs",
        "--metrics",
        "psnr",
    ]
    assert reproduce.main([*map(str, given), "--rdo", "0.2"]) == 0
    capsys.readouterr()
    rows = {row["codec"]: row for row in json.loads((tmp_path / "o" / "rates.json").read_text())["pictures"]}
    usual, other = rows["small"], rows["small-rdo-0.2"]
    assert int(other["bytes"]) < int(usual["bytes"]) and "rdo 0.2" in other["made_from"]
    assert ", rdo 0.0625, " in usual["made_from"]


def test_pictures_of_one_size_are_chosen_for_each_by_itself(codec, image):
    model, shown = weighted(codec.model, 0.2), [image, image.flip(2)]
    together, alone = model.signals(torch.stack(shown))[1], [model.signals(each[None])[1] for each in shown]
    assert torch.equal(together, torch.cat(alone)) and not torch.equal(*alone)


def test_a_picture_in_tiles(codec, image):
    """Its base is that of whole maps within what tiles change."""
    whole, tiled = weighted(codec.model, 0.2), weighted(codec.model, 0.2)
    tiled.tile_side = 64
    assert not tiled.tiles(192, 256).small
    data = tiled.compress(image, 30)
    assert len(data) == pytest.approx(len(whole.compress(image, 30)), rel=0.1)
    assert (tiled.decompress(data).float() - image).abs().mean() < 20
