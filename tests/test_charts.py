import numpy as np
import pytest
import torch
from PIL import Image

from measuring.charts import COLUMN, MARGIN, Curve, bars, chart, contact_sheet
from measuring.intervals import Interval
from utils.images import read_image


def test_a_mark_lies_on_its_curve(tmp_path):
    """A diamond of the curve's own colour with a black edge, and nothing else that is different."""
    pixels = {}
    for mark in (None, 2.5):
        chart([Curve("a", [1, 2, 3], [1, 4, 0], mark)], tmp_path / "a.png", "x", "y", "title")
        pixels[mark] = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    rows, columns = np.nonzero((pixels[None] != pixels[2.5]).any(axis=2))
    height, width, _ = pixels[None].shape
    assert 10 < np.ptp(rows) < height / 10 and 10 < np.ptp(columns) < width / 10
    # (2.5, 2) lies at three quarters of the width of the axes and half their height.
    assert abs(rows.mean() / height - 0.5) < 0.06 and 0.65 < columns.mean() / width < 0.8


def test_bars_are_as_long_as_their_values_and_the_first_is_on_top(tmp_path):
    bars({"a": Interval(1.0), "b": Interval(2.0, 1.9, 2.1)}, tmp_path / "a.png", "x", "title")
    grey = (np.asarray(Image.open(tmp_path / "a.png").convert("RGB")) == 191).all(axis=2)
    lengths = grey.sum(axis=1)
    upper, lower = np.split(lengths, [int(np.flatnonzero(lengths).mean())])
    assert lower.max() / upper.max() == pytest.approx(2, rel=0.05)
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def flat(height: int, width: int, *colour: int) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, height, width)


def extent(sheet: torch.Tensor, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of the box around all pixels of one colour."""
    rows, columns = torch.where((sheet == torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)).all(dim=0))
    left, top = columns.min().item(), rows.min().item()
    return left, top, columns.max().item() - left + 1, rows.max().item() - top + 1


@pytest.mark.parametrize(
    "size, scaled",
    [((100, 200), (100, 200)), ((512, 768), (341, 512)), ((768, 512), (512, 341)), ((40, 4000), (5, 512))],
)
def test_pictures_stand_beside_each_other_and_rows_above_each_other(tmp_path, size, scaled):
    """Scaled down in proportion, never up; captions, however long, stay below their picture and in its column."""
    second = (flat(32, 48, 0, 255, 0), flat(32, 48, 255, 0, 255), "left", "right")
    contact_sheet([(flat(*size, 255, 0, 0), flat(*size, 0, 0, 255), "c" * 300, "b"), second], tmp_path / "sheet.png")
    sheet = read_image(tmp_path / "sheet.png")
    left, top, width, height = extent(sheet, (255, 0, 0))
    assert (height, width) == scaled and left == MARGIN + (COLUMN - width) // 2
    assert extent(sheet, (0, 0, 255)) == (left + COLUMN + MARGIN, top, width, height)
    below, gap = extent(sheet, (0, 255, 0))[1], slice(MARGIN + COLUMN, 2 * MARGIN + COLUMN)
    assert (sheet[:, top + height : below] < 128).any() and (sheet[:, below + 32 :] < 128).any()
    assert (sheet[:, :, gap] == 255).all() and (sheet[:, :, -MARGIN:] == 255).all()
