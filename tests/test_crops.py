"""The command `crops`: which squares it shows, what stands below them, and that it codes nothing twice."""

import pytest
import torch

from experiments.baselines import Baseline
from experiments.crops import Crop, crops_of
from measuring.sheets import GAP, LINE, MARGIN, Band, Cell, sheet
from models.codec import Codec
from tests.commands import photograph
from tests.small_releases import reproduce, rows_in, told_in, two_layers
from utils.errors import DiffoError
from utils.images import read_image


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return two_layers(tmp_path_factory.mktemp("weights") / "nano")


@pytest.fixture
def pictures(tmp_path):
    for i in range(4):
        photograph(tmp_path / "set" / f"{i}.png", 96, 80, seed=i)
    return tmp_path / "set"


def test_pictures_of_a_sheet_are_there_pixel_by_pixel():
    """Two columns as wide as the pictures, of which the second begins a gap further; below a heading's line."""
    a, b = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = sheet([Band("", [Cell(a, []), Cell(b, [])]), Band("", [Cell(None, [])])], [], 40)
    top, second = MARGIN + LINE + GAP, MARGIN + 40 + GAP
    assert torch.equal(drawn[:, top : top + 40, MARGIN : MARGIN + 40], a)
    assert torch.equal(drawn[:, top : top + 40, second : second + 40], b)
    assert drawn.shape[2] == 2 * MARGIN + 80 + GAP


def test_a_sheet_grows_with_its_words():
    """A column is as wide as its widest line; a note is broken to the width of the sheet."""
    cell = Cell(torch.zeros(3, 16, 16, dtype=torch.uint8), ["a name far wider than sixteen pixels"])
    narrow, wide = (sheet([Band("", [Cell(cell.picture, lines)])], [], 16) for lines in ([""], cell.lines))
    assert wide.shape[2] > narrow.shape[2] + 100
    noted = sheet([Band("", [cell])], ["word " * 40], 16)
    assert noted.shape[2] == wide.shape[2] and noted.shape[1] > wide.shape[1] + 2 * LINE


def test_squares_are_where_they_were_asked_for_or_in_the_middle(pictures):
    named = {path.name: path for path in sorted(pictures.iterdir())}
    assert crops_of([("1", 5, 7), ("2.png", None, None)], named, 32) == [Crop("1.png", 5, 7), Crop("2.png", 32, 24)]
    assert [crop.picture for crop in crops_of([], named, 32)] == ["0.png", "2.png", "3.png"]  # evenly spread
    assert crops_of([("1", 64, 48)], named, 32)  # the last place
    for asked, told in (("x", 0, 0), "x: no such picture"), (("1", 65, 0), "65,0 are not inside its 96x80"):
        with pytest.raises(DiffoError, match=told):
            crops_of([asked], named, 32)


def test_what_is_shown_is_what_was_coded_and_nothing_is_coded_twice(release, pictures, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["crops", "--weights", release, "--data", pictures, "--crops", "1@8,16", "--side", 32, "-o", out]
    command += ["--qualities", 0, 100, "--codecs", "webp", "--metrics", "psnr"]
    assert reproduce(*command) == 0
    assert {row["picture"] for row in rows_in(out / "rates.csv")} == {"1.png"}  # the others are not coded
    rows = told_in(out / "crops.json")["rows"]
    assert [(row["codec"], row["label"]) for row in rows] == [
        ("nano", "0"), ("webp", "at 0"), ("nano", "100"), ("webp", "at 100")
    ]  # fmt: skip
    drawn, top = read_image(out / "crops.png"), MARGIN + LINE + GAP
    square = (slice(None), slice(16, 48), slice(8, 40))
    assert torch.equal(drawn[:, top : top + 32, MARGIN : MARGIN + 32], read_image(pictures / "1.png")[square])
    decoded = read_image(out / "decoded" / "nano" / "0" / "1.png")[square]
    found = drawn[:, top : top + 32].unfold(2, 32, 1)  # the second column is as wide as its words
    assert any(torch.equal(found[:, :, at], decoded) for at in range(found.shape[2]))
    assert "crops.png" in capsys.readouterr().out
    for owner, name in ((Codec, "analyse"), (Baseline, "fit")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("coded again"))
    (out / "crops.png").unlink()
    assert reproduce(*command) == 0 and (out / "crops.png").is_file()


@pytest.mark.parametrize(
    "flags, told",
    [
        ([], "name pictures with --data, or take the demo photographs"),
        (["--demo", "--data", "PICTURES"], "name pictures with --data, or take the demo photographs"),
        (["--data", "PICTURES", "--crops", "1@3"], "1@3 is not NAME or NAME@LEFT,TOP"),
        (["--data", "PICTURES", "--crops", "7"], "--crops 7: no such picture"),
        (["--data", "PICTURES", "--crops", "1", "--side", "90"], "90x90 pixels from 3,-5 are not inside its 96x80"),
        (["--data", "PICTURES", "--side", "8"], "a number of pixels from 16 to 1024"),
    ],
)
def test_options_are_checked_before_anything_is_coded(flags, told, release, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Codec, "analyse", lambda *_: pytest.fail("a picture was coded"))
    flags = [str(pictures) if flag == "PICTURES" else flag for flag in flags]
    assert reproduce("crops", "--weights", release, *flags, "-o", tmp_path / "out")
    assert told in capsys.readouterr().err
