"""Pictures that are coded smaller than they are: files, pictures, the scale that suits a budget, and who asks for one."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from coding import budget, options
from coding.api import load_codec
from coding.steps import Steps
from measuring.metrics import psnr
from models.bitstream import LEAST_SCALE, WHOLE, CodedPicture, pack, unpack
from models.codec import Codec
from tests.commands import call
from tests.residual import new_codec, picture
from utils.errors import BudgetError
from utils.images import read_image, resized, to_tensor, write_image


@pytest.fixture(scope="module")
def codec() -> Codec:
    return new_codec()


@pytest.fixture(scope="module")
def small():
    return load_codec()


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    return torch.from_numpy(data.astronaut()[:256, 60:412]).permute(2, 0, 1).contiguous()


# Files and pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 90])
def test_a_scaled_file_is_that_of_the_smaller_picture_and_decodes_to_the_whole_size(codec, code):
    """320x207 pixels at 10/16: 200x129, whose sides are rounded; header apart the files are equal."""
    image = picture(207, 320)
    smaller = resized(image, 129, 200)
    ours, theirs = codec.write(codec.analyse(image, 10), code), codec.write(codec.analyse(smaller), code)
    file, other = unpack(ours), unpack(theirs)
    assert (file.height, file.width, file.scale, len(ours)) == (207, 320, 10, len(theirs) + 1)
    assert replace(file, height=129, width=200, scale=WHOLE) == other and file.section_bpp == other.section_bpp
    decoded, expected = codec.decode(ours), codec.decode(theirs)
    assert torch.equal(decoded.image, resized(expected.image, 207, 320)) and decoded.eta == expected.eta
    assert codec.compress(image, 100 * code / 255, scale=10) == ours
    preview = codec.decode(ours, preview=True).image
    assert preview.shape == image.shape and torch.equal(
        preview, codec.decompress(codec.write(codec.analyse(image, 10), 0))
    )


def test_files_of_several_sizes_go_through_the_networks_at_once_if_their_coded_sizes_are_equal(codec):
    files = [
        codec.compress(picture(*size), 60, scale) for size, scale in (((64, 96), 16), ((128, 192), 8), ((127, 191), 8))
    ]
    together = codec.render_all([codec.read(file) for file in files])
    assert [tuple(each.image.shape) for each in together] == [(3, 64, 96), (3, 128, 192), (3, 127, 191)]
    for each, file in zip(together, files, strict=True):
        assert (each.image.int() - codec.decompress(file).int()).abs().max() <= 1  # networks round batches otherwise


def test_the_smallest_pictures_are_not_made_smaller(codec):
    image = picture(17, 40)
    file = unpack(codec.compress(image, 50, scale=LEAST_SCALE))
    assert file.coded_size == (16, 16) and codec.decompress(pack(file)).shape == image.shape


def test_resizing():
    flat = torch.full((3, 21, 34), 77, dtype=torch.uint8)
    assert torch.equal(resized(flat, 55, 13), torch.full((3, 55, 13), 77, dtype=torch.uint8))
    image = picture(40, 24)
    assert resized(image, 40, 24) is image
    # To half, Lanczos' filter of 3 lobes has 12 taps: sinc(x) sinc(x / 3) at x = 1/4, 3/4, ... 11/4 on both sides; to
    # double, 6, at x = 1/4, 5/4, 9/4 and 3/4, 7/4, 11/4.
    x = np.arange(0.25, 3, 0.5)
    half = np.sinc(x) * np.sinc(x / 3)
    weights = np.concatenate([half[::-1], half])
    values = np.random.default_rng(0).integers(60, 196, 64).astype(np.uint8)
    row = torch.from_numpy(np.broadcast_to(values, (3, 16, 64)).copy())
    found = resized(row, 16, 32)[0, 0].numpy()
    expected = [(weights * values[2 * i - 5 : 2 * i + 7]).sum() / weights.sum() for i in range(4, 28)]
    assert np.abs(found[4:28] - expected).max() <= 1
    found = resized(row, 16, 128)[0, 0].numpy()
    taps = np.array([half[4], half[2], half[0], half[1], half[3], half[5]])  # of the positions from -9/4 to 11/4
    expected = [(taps * values[i - 2 : i + 4]).sum() / taps.sum() for i in range(4, 60)]
    assert np.abs(found[9:121:2] - expected).max() <= 1


# Budgets --------------------------------------------------------------------------------------------------------------


class Analysed:
    """A picture of 512x512 pixels as `fit_scaled` sees it: `base` bytes of 1024 indices, 19 beside them."""

    def __init__(self, codec, scale: int):
        self.file = CodedPicture(512, 512, b"abcd", bytes(codec.base), False, scale=scale)


class Sizes:
    """A codec whose base of the whole picture has `base` bytes, and scales that were analysed."""

    def __init__(self, base: int, has_levels: bool = True):
        self.base, self.has_levels, self.scales = base, has_levels, []

    def analyse(self, scale: int) -> Analysed:
        self.scales.append(scale)
        return Analysed(self, scale)

    def write(self, analysed: Analysed, code: int) -> bytes:
        return pack(analysed.file)


@pytest.mark.parametrize(
    ("share", "scale"),
    [(8, 16), (2, 16), (1.99, 15), (1.5, 13), (1, 11), (0.5, 8), (0.2, 5), (0.1, 4)],
)
def test_the_scale_follows_from_the_budget_by_hand(share, scale, monkeypatch):
    """At n sixteenths there are 4 n^2 indices of 1024: 16 sqrt(share / 2), rounded down; of 1.5 times the base 13.9."""
    codec = Sizes(2000)
    monkeypatch.setattr(budget, "fit", lambda codec, picture, most: budget.Fitted(bytes(most), picture.file.scale))
    fitted = budget.fit_scaled(codec, 19 + round(2000 * share), codec.analyse)
    assert fitted.code == scale and codec.scales == ([16] if scale == 16 else [16, scale])


def test_a_scale_at_which_no_residual_fits_is_passed_over(monkeypatch):
    """The first is too large, the second takes the base alone: the third has a residual."""
    codec, tried = Sizes(2000), []

    def fit(codec, picture, most):
        tried.append(picture.file.scale)
        if picture.file.scale == 11:
            raise BudgetError("too small")
        return budget.Fitted(b"", 0 if picture.file.scale == 10 else 1)

    monkeypatch.setattr(budget, "fit", fit)
    assert budget.fit_scaled(codec, 2019, codec.analyse).code == 1
    assert tried == [11, 10, 9]


def test_where_no_residual_fits_the_largest_base_is_sent(monkeypatch):
    """Of the whole picture where that fits, else of the first scale that does; and no more than three scales are tried."""
    codec = Sizes(2000)
    monkeypatch.setattr(budget, "fit", lambda codec, picture, most: budget.Fitted(bytes([picture.file.scale]), 0))
    whole = budget.fit_scaled(codec, 2019, codec.analyse)
    assert whole.data == codec.write(Analysed(codec, 16), 0) and whole.code == 0 and codec.scales == [16, 11, 10, 9]
    assert budget.fit_scaled(codec, 2018, codec.analyse).data == bytes([11])


@pytest.mark.parametrize("side", [16, 32, 48])
def test_small_pictures_at_the_bytes_of_their_base_get_it(side, small, photograph):
    image = photograph[:, 40 : 40 + side, 60 : 60 + side]
    base = small.compress(image)
    assert small.compress(image, max_bytes=len(base)) == base == small.compress(image, max_bytes=len(base) + 1)
    if side == 16:  # made smaller it is as large, and its file has a byte more
        with pytest.raises(BudgetError, match=f"its smallest file has {len(base)} bytes"):
            small.compress(image, max_bytes=len(base) - 1)


@pytest.mark.parametrize("size", [(256, 256), (20, 2000)], ids=str)
def test_weights_without_a_residual_code_the_largest_picture_that_fits(size):
    """Or the next: how many bits the indices of a smaller picture take is not known before."""
    codec = new_codec()
    codec.residual = None
    image = picture(*size)
    analyse = partial(codec.analyse, image)
    sizes = {scale: len(codec.write(analyse(scale), 0)) for scale in range(LEAST_SCALE, WHOLE + 1)}
    base = sizes[WHOLE]
    for allowed in (base + 50, base, base - 1, (base + sizes[LEAST_SCALE]) // 2, sizes[LEAST_SCALE]):
        fitted = budget.fit_scaled(codec, allowed, analyse)
        largest = max(scale for scale, size in sizes.items() if size <= allowed)
        found = unpack(fitted.data)
        assert largest - 1 <= found.scale <= largest and fitted.code == 0 and len(fitted.data) <= allowed
        assert found.scale == WHOLE or allowed < base
    smallest = min(sizes.values())
    with pytest.raises(BudgetError, match=f"too few .* its smallest file has {smallest:,} bytes .*bpp.$"):
        budget.fit_scaled(codec, smallest - 1, analyse)


@pytest.mark.parametrize("share", [0.4, 0.7, 1, 1.6, 3])
def test_budgets_of_the_weights_that_ship(small, photograph, share):
    model = small.model
    whole = model.analyse(photograph)
    allowed = round(share * len(model.write(whole, 0)))
    data = small.compress(photograph, max_bytes=allowed)
    file = unpack(data)
    assert 0.9 * allowed < len(data) <= allowed and file.residual and (file.scale == WHOLE) == (share == 3)
    assert len(file.base) < 0.6 * allowed and small.decompress(data).shape == photograph.shape
    assert share < 3 or data == budget.fit(model, whole, allowed).data
    assert small.compress(photograph, target_bpp=8 * allowed / photograph[0].numel()) == data


def test_a_smaller_picture_with_a_residual_is_nearer_than_the_base_alone(small, photograph):
    """At equal bytes, with the weights that ship: what the rule of the scale is for."""
    base = small.compress(photograph)
    scaled = small.compress(photograph, max_bytes=len(base))
    assert unpack(scaled).residual and len(scaled) <= len(base)
    assert psnr(photograph, small.decompress(scaled)) > psnr(photograph, small.decompress(base))


def test_a_scale_that_is_asked_for_stays(small, photograph):
    base = len(small.compress(photograph))
    for scale in (1, 0.75):
        assert unpack(small.compress(photograph, max_bytes=3 * base, scale=scale)).scale == 16 * scale
    with pytest.raises(
        BudgetError, match=r"smallest file has [\d,]+ bytes \([\d.]+ bpp\) at scale 1, and smaller ones below"
    ):
        small.compress(photograph, max_bytes=base - 1, scale=1)
    with pytest.raises(ValueError, match="scale 0.7: a multiple of 1/16 from 0.25 to 1"):
        small.compress(photograph, scale=0.7)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name, array in (
        ("a", data.astronaut()[:160, 100:356]),
        ("b", data.chelsea()[40:200, :256]),
        ("c", data.coffee()[:96, :96]),
    ):
        write_image(folder / f"{name}.png", to_tensor(Image.fromarray(array)))
    return folder


def test_the_command_takes_a_scale(photographs, tmp_path, capsys):
    """In float32: in bfloat16 pictures that go through the networks together differ by up to 3 levels from one by itself."""
    small = load_codec(precision="float32")
    exact = "--scale", "0.5", "--precision", "float32"
    status, out, error = call(capsys, "-i", photographs, "-o", tmp_path / "o", "--quality", "30", *exact)
    assert status == 0, error
    rows = json.loads((tmp_path / "o" / "metrics.json").read_text())["pictures"]
    assert [row["scale"] for row in rows] == [0.5] * 3 and "scale" in out.splitlines()[0]
    for name in "abc":
        image, file = read_image(photographs / f"{name}.png"), (tmp_path / "o" / f"{name}.dfo").read_bytes()
        assert file == small.compress(image, quality=30, scale=0.5)
        difference = read_image(tmp_path / "o" / f"{name}.png").int() - small.decompress(file).int()
        assert difference.abs().max() <= 1  # pictures of one size go through the networks together
    status, _, error = call(
        capsys, "--mode", "decompress", "-i", tmp_path / "o", "-o", tmp_path / "p", "-r", photographs, *exact[2:]
    )
    assert status == 0, error
    again = json.loads((tmp_path / "p" / "metrics.json").read_text())["pictures"]
    assert [row["psnr"] for row in again] == pytest.approx([row["psnr"] for row in rows], abs=0.01)
    status, out, _ = call(capsys, "--mode", "inspect", "-i", tmp_path / "o" / "a.dfo", "--json")
    assert (json.loads(out)["scale"], json.loads(out)["width"]) == (0.5, 256)


def test_files_of_one_size_and_several_scales_are_decoded_in_one_go(photographs, small, tmp_path, capsys):
    for scale in (0.5, 0.75, 1):
        (tmp_path / f"{scale}.dfo").write_bytes(small.compress(photographs / "a.png", scale=scale))
    status, _, error = call(capsys, "--mode", "decompress", "-i", tmp_path, "-o", tmp_path / "out", "--batch", "3")
    assert status == 0, error
    for scale in (0.5, 0.75, 1):
        decoded = small.decompress((tmp_path / f"{scale}.dfo").read_bytes())
        written = read_image(tmp_path / "out" / f"{scale}.png")
        apart = (written.int() - decoded.int()).abs()  # the batch has other kernels, and bfloat16 rounds by 3 levels
        assert apart.max() <= 6 and apart.float().mean() < 0.3


@pytest.mark.parametrize("way", [["--batch", "1"], []], ids=["one", "many"])
def test_budgets_of_a_folder_are_those_of_its_pictures(way, photographs, small, tmp_path, capsys, monkeypatch):
    turns, turn_for = [], Steps._turn_for
    monkeypatch.setattr(Steps, "_turn_for", lambda *args: turns.append(args[-1]) or turn_for(*args))
    status, _, error = call(capsys, "-i", photographs, "-o", tmp_path, "--target_bpp", "0.05", *way)
    assert status == 0, error
    assert (
        turns.count("encode") >= 5
    )  # networks of the whole pictures, of which two have one size, and of three smaller ones
    for name in "abc":
        file = (tmp_path / f"{name}.dfo").read_bytes()
        assert file == small.compress(photographs / f"{name}.png", target_bpp=0.05) and unpack(file).scale < WHOLE


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--scale", "0.7"], "--scale: 0.7 is not a multiple of 1/16 from 0.25 to 1, as 0.75 or 0.625"),
        (["--scale", "2"], "--scale: 2 is not"),
        (["--mode", "decompress", "--scale", "0.5"], "--scale goes with --mode roundtrip or compress"),
    ],
)
def test_scales_that_cannot_be_are_told(flags, told, photographs, tmp_path, capsys):
    status, _, error = call(capsys, "-i", photographs, "-o", tmp_path / "o", *flags)
    assert status == 2 and told in error and not (tmp_path / "o").exists()


def test_the_published_command_names_the_scale_1():
    for mode in options.MODES:
        assert options.parse(["-i", "a", "-o", "b", "--mode", mode, "--scale", "1"]).scale == 1
