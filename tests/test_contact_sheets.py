import pytest
import torch

from measuring.contact_sheets import COLUMN, MARGIN, contact_sheet
from utils.images import read_image


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
