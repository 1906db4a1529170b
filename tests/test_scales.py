"""Pictures that are coded smaller than they are: files, pictures, the scale that suits a budget, and who asks for one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from coding import budget, options
from coding.api import load_codec
from measuring.metrics import psnr
from models.bitstream import LEAST_SCALE, WHOLE, pack, unpack
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
    # To half, Lanczos' filter of 3 lobes has 12 taps: sinc(x) sinc(x / 3) at x = 1/4, 3/4, ... 11/4 on both sides.
    x = np.arange(0.25, 3, 0.5)
    weights = np.sinc(x) * np.sinc(x / 3)
    weights = np.concatenate([weights[::-1], weights])
    ramp = np.minimum(np.arange(64) ** 2 / 16, 255).astype(np.uint8)
    row = torch.from_numpy(np.broadcast_to(ramp, (3, 16, 64)).copy())
    found = resized(row, 16, 32)[0, 0].numpy()
    expected = [(weights * ramp[2 * i - 5 : 2 * i + 7]).sum() / weights.sum() for i in range(4, 28)]
    assert np.abs(found[4:28] - expected).max() <= 1


# Budgets --------------------------------------------------------------------------------------------------------------


class Sizes:
    """A codec as `fit_scaled` sees it: base of `base` bytes at the whole size and as its area shrinks, 20 bytes header."""

    def __init__(self, base: int, has_levels: bool = True):
        self.base, self.has_levels, self.analysed = base, has_levels, []

    def analyse(self, image, scale: int = WHOLE):
        self.analysed.append(scale)
        return replace(unpack(new_codec().compress(picture(16, 16))), height=512, width=512, scale=scale)

    def write(self, analysed, code: int) -> bytes:
        return bytes(20 + round((self.base - 20) * (analysed.scale / WHOLE) ** 2) + (12 + 4 * code if code else 0))


@pytest.mark.parametrize(
    ("share", "scale"),
    [(8, 16), (2.3, 16), (2.2, 15), (1.5, 13), (1, 10), (0.5, 7), (0.2, 4), (0.1, 4)],
)
def test_the_scale_follows_from_the_budget_by_hand(share, scale, monkeypatch):
    """16 sqrt(0.45 budget / base), rounded down: of 1.5 times the base 13.1."""
    codec = Sizes(2000)
    monkeypatch.setattr(budget, "fit", lambda codec, picture, most: budget.Fitted(bytes(most), picture.scale))
    fitted = budget.fit_scaled(codec, None, round(2000 * share), codec.analyse(None))
    assert fitted.code == scale and codec.analysed == ([16] if scale == 16 else [16, scale])


def test_a_scale_at_which_no_residual_fits_is_passed_over(monkeypatch):
    """The first three are too large, and the fourth takes the base alone: the fifth is the first with a residual."""
    codec, tried = Sizes(2000), []

    def fit(codec, picture, most):
        tried.append(picture.scale)
        if picture.scale > 7:
            raise BudgetError("too small")
        return budget.Fitted(b"", 0 if picture.scale == 7 else 1)

    monkeypatch.setattr(budget, "fit", fit)
    assert budget.fit_scaled(codec, None, 2000, codec.analyse(None)).code == 1
    assert tried == [10, 9, 8, 7, 6]


def test_weights_without_a_residual_code_the_largest_picture_that_fits():
    codec = new_codec()
    codec.residual = None
    image = picture(256, 256)
    whole = codec.analyse(image)
    base = len(codec.write(whole, 0))
    sizes = {scale: len(codec.write(codec.analyse(image, scale), 0)) for scale in range(LEAST_SCALE, WHOLE)}
    for allowed in (base + 50, base, base - 1, base // 2, sizes[LEAST_SCALE]):
        fitted = budget.fit_scaled(codec, image, allowed, whole)
        largest = max(scale for scale, size in {**sizes, WHOLE: base}.items() if size <= allowed)
        assert unpack(fitted.data).scale == largest and fitted.code == 0
    with pytest.raises(BudgetError, match=f"too few .* its smallest file has {sizes[LEAST_SCALE]:,} bytes .*bpp.$"):
        budget.fit_scaled(codec, image, sizes[LEAST_SCALE] - 1, whole)


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
    assert psnr(photograph, small.decompress(scaled)) > psnr(photograph, small.decompress(base)) + 0.1


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


def test_the_command_takes_a_scale(photographs, small, tmp_path, capsys):
    status, out, error = call(capsys, "-i", photographs, "-o", tmp_path / "o", "--quality", "30", "--scale", "0.5")
    assert status == 0, error
    rows = json.loads((tmp_path / "o" / "metrics.json").read_text())["pictures"]
    assert [row["scale"] for row in rows] == [0.5] * 3 and "scale" in out.splitlines()[0]
    for name in "abc":
        image, file = read_image(photographs / f"{name}.png"), (tmp_path / "o" / f"{name}.dfo").read_bytes()
        assert file == small.compress(image, quality=30, scale=0.5)
        difference = read_image(tmp_path / "o" / f"{name}.png").int() - small.decompress(file).int()
        assert difference.abs().max() <= 1  # pictures of one size go through the networks together
    status, _, error = call(
        capsys, "--mode", "decompress", "-i", tmp_path / "o", "-o", tmp_path / "p", "-r", photographs
    )
    assert status == 0, error
    again = json.loads((tmp_path / "p" / "metrics.json").read_text())["pictures"]
    assert [row["psnr"] for row in again] == pytest.approx([row["psnr"] for row in rows], abs=0.01)
    status, out, _ = call(capsys, "--mode", "inspect", "-i", tmp_path / "o" / "a.dfo", "--json")
    assert (json.loads(out)["scale"], json.loads(out)["width"]) == (0.5, 256)


@pytest.mark.parametrize("way", [["--batch", "1"], []], ids=["one", "many"])
def test_budgets_of_a_folder_are_those_of_its_pictures(way, photographs, small, tmp_path, capsys):
    status, _, error = call(capsys, "-i", photographs, "-o", tmp_path, "--target_bpp", "0.05", *way)
    assert status == 0, error
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
