"""Sheets of originals beside decoded pictures, drawn with Pillow alone."""

import os
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from utils.files import atomic_path

# Pixels. A picture fits a square as wide as its COLUMN, so that portraits stay as large as landscapes and rows stay low.
COLUMN = 512
MARGIN = 28
GUTTER = 20
CAPTION_GAP = 8
ROW_GAP = 26

_INK = (32, 32, 32)
_FAINT = (110, 110, 110)
_FRAME = (216, 216, 216)

Row = tuple[torch.Tensor, torch.Tensor, str, str]


def contact_sheet(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw rows of (original, decoded, caption of the original, caption of the decoded) as one PNG file at `path`.

    Pictures are uint8 tensors (3, H, W), RGB. Each is scaled down, never up, to fit 512x512 pixels, and centred in its
    column above its caption; a caption too long for the column is wrapped.

    Raises ValueError if there are no rows, DiffoError if the folder of `path` cannot be written.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    heading, text = ImageFont.load_default(22), ImageFont.load_default(18)
    drawn = [_Row(row, text) for row in rows]
    heading_height = _line_height(heading) + CAPTION_GAP
    height = 2 * MARGIN + heading_height + sum(row.height for row in drawn) + ROW_GAP * (len(drawn) - 1)
    sheet = Image.new("RGB", (2 * MARGIN + 2 * COLUMN + GUTTER, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(("original", "decoded")):
        pen.text((_centre(column), MARGIN), name, font=heading, fill=_FAINT, anchor="ma")
    top = MARGIN + heading_height
    for row in drawn:
        row.draw(sheet, pen, top)
        top += row.height + ROW_GAP
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


class _Row:
    """One row laid out: two scaled pictures and their wrapped captions."""

    def __init__(self, row: Row, font: ImageFont.FreeTypeFont) -> None:
        self.font = font
        self.pictures = [_scaled(picture) for picture in row[:2]]
        self.captions = [_wrapped(caption, font) for caption in row[2:]]
        self.picture_height = max(picture.height for picture in self.pictures)
        lines = max(len(caption) for caption in self.captions)
        self.height = self.picture_height + CAPTION_GAP + lines * _line_height(font)

    def draw(self, sheet: Image.Image, pen: ImageDraw.ImageDraw, top: int) -> None:
        for column, (picture, caption) in enumerate(zip(self.pictures, self.captions, strict=True)):
            left = _centre(column) - picture.width // 2
            # A thin frame shows where a white picture ends.
            pen.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=_FRAME)
            sheet.paste(picture, (left, top))
            for number, line in enumerate(caption):
                y = top + self.picture_height + CAPTION_GAP + number * _line_height(self.font)
                pen.text((_centre(column), y), line, font=self.font, fill=_INK, anchor="ma")


def _centre(column: int) -> int:
    return MARGIN + column * (COLUMN + GUTTER) + COLUMN // 2


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics()) + 2


def _scaled(picture: torch.Tensor) -> Image.Image:
    image = Image.fromarray(picture.permute(1, 2, 0).cpu().contiguous().numpy())
    factor = min(1.0, COLUMN / max(image.size))
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _wrapped(caption: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """The caption in lines no wider than a column; a word that alone is wider loses its end."""
    lines: list[str] = []
    for word in caption.split():
        while font.getlength(word) > COLUMN:
            word = word[:-2] + "…"
        if lines and font.getlength(f"{lines[-1]} {word}") <= COLUMN:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
