import os

import pytest
import torch

from measuring.contact_sheets import COLUMN, GUTTER, MARGIN, ROW_GAP, contact_sheet
from utils.errors import DiffoError
from utils.images import read_image

WIDTH = 2 * MARGIN + 2 * COLUMN + GUTTER


def flat(height: int, width: int, *colour: int) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, height, width)


def drawn(tmp_path, *rows) -> torch.Tensor:
    contact_sheet(rows, tmp_path / "sheet.png")
    return read_image(tmp_path / "sheet.png")


def extent(sheet: torch.Tensor, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of the box around all pixels of one colour."""
    rows, columns = torch.where((sheet == torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)).all(dim=0))
    left, top = columns.min().item(), rows.min().item()
    return left, top, columns.max().item() - left + 1, rows.max().item() - top + 1


def has_ink(sheet: torch.Tensor) -> bool:
    return bool((sheet < 128).any())


def test_pictures_stand_side_by_side_in_their_columns(tmp_path):
    sheet = drawn(tmp_path, (flat(100, 200, 255, 0, 0), flat(100, 200, 0, 0, 255), "left", "right"))
    assert sheet.shape[2] == WIDTH
    left, top, *size = extent(sheet, (255, 0, 0))
    assert size == [200, 100] and left == MARGIN + (COLUMN - 200) // 2
    assert extent(sheet, (0, 0, 255)) == (left + COLUMN + GUTTER, top, 200, 100)


@pytest.mark.parametrize("size, scaled", [((512, 768), (341, 512)), ((768, 512), (512, 341)), ((40, 4000), (5, 512))])
def test_large_pictures_are_scaled_down_in_proportion(tmp_path, size, scaled):
    sheet = drawn(tmp_path, (flat(*size, 255, 0, 0), flat(*size, 0, 0, 255), "a", "b"))
    left, top, width, height = extent(sheet, (255, 0, 0))
    assert (height, width) == scaled
    assert MARGIN <= left and left + width <= MARGIN + COLUMN


def test_rows_do_not_overlap(tmp_path):
    portrait = (flat(768, 512, 255, 0, 0), flat(768, 512, 0, 255, 0), "a", "b")
    landscape = (flat(512, 768, 0, 0, 255), flat(512, 768, 255, 0, 255), "c", "d")
    sheet = drawn(tmp_path, portrait, landscape)
    _, first_top, _, first_height = extent(sheet, (255, 0, 0))
    _, second_top, _, second_height = extent(sheet, (0, 0, 255))
    between = sheet[:, first_top + first_height + 1 : second_top - 1]
    assert between.shape[1] > ROW_GAP and has_ink(between)
    below = sheet[:, second_top + second_height + 1 :]
    assert has_ink(below) and not has_ink(below[:, -MARGIN:])


@pytest.mark.parametrize("caption", ["0.0312 bpp · 1,552 bytes · 21.3 dB " * 4, "x" * 300, "long" * 9 + " name " * 40])
def test_long_captions_stay_in_their_column(tmp_path, caption):
    picture = flat(64, 64, 255, 255, 255)
    short, long = drawn(tmp_path, (picture, picture, "a", "b")), drawn(tmp_path, (picture, picture, caption, "b"))
    assert long.shape[1] > short.shape[1] or " " not in caption
    for place in (
        slice(0, MARGIN - 1),
        slice(MARGIN + COLUMN + 1, MARGIN + COLUMN + GUTTER - 1),
        slice(-MARGIN + 1, None),
    ):
        assert not has_ink(long[:, :, place])
    assert not has_ink(long[:, -MARGIN:])


def test_no_rows_and_no_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([], tmp_path / "sheet.png")
    picture = flat(16, 16, 0, 0, 0)
    with pytest.raises(DiffoError, match="no folder"):
        contact_sheet([(picture, picture, "a", "b")], tmp_path / "none" / "sheet.png")
    assert os.listdir(tmp_path) == []
