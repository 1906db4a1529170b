"""Sheets of originals beside decoded pictures, drawn with Pillow alone."""

import os
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from utils.files import atomic_path

COLUMN, MARGIN, CAPTION = 512, 24, 36  # pixels; pictures fit a square as wide as a column: portraits stay as large

Row = tuple[torch.Tensor, torch.Tensor, str, str]


def contact_sheet(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw rows of (original, decoded, caption of each) as one PNG file at `path`.

    Pictures are uint8 tensors (3, H, W), RGB; each is scaled down, never up, to fit 512x512 pixels.

    Raises DiffoError if the folder of `path` cannot be written.
    """
    drawn = [(_captioned(original, told), _captioned(decoded, tells)) for original, decoded, told, tells in rows]
    heights = [max(left.height, right.height) for left, right in drawn]
    sheet = Image.new("RGB", (2 * COLUMN + 3 * MARGIN, sum(heights) + MARGIN * (len(drawn) + 1)), "white")
    top = MARGIN
    for row, height in zip(drawn, heights, strict=True):
        for column, image in enumerate(row):
            sheet.paste(image, (MARGIN + column * (COLUMN + MARGIN), top))
        top += height + MARGIN
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _captioned(picture: torch.Tensor, caption: str) -> Image.Image:
    """A picture centred above its caption, of which nothing is wider than the column."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((COLUMN, COLUMN), Image.Resampling.LANCZOS)
    whole = Image.new("RGB", (COLUMN, image.height + CAPTION), "white")
    whole.paste(image, ((COLUMN - image.width) // 2, 0))
    font = ImageFont.load_default(18)
    ImageDraw.Draw(whole).text((COLUMN // 2, image.height + CAPTION // 4), caption, "black", font, anchor="ma")
    return whole
