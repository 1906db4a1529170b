"""Sheets of pictures at their own scale, each above the lines that tell what it is, drawn with Pillow."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.images import to_pillow, to_tensor

MARGIN, GAP = 20, 10  # pixels around the sheet and between its parts
SIZE = 14  # of the letters
LINE = 19  # pixels from one line to the next
BACKGROUND, INK, SOFT, EMPTY = "white", "black", "#444444", "#dddddd"


@dataclass(frozen=True)
class Cell:
    """A picture, uint8 (3, S, S), or None where there is none, and the lines below it; the first one is its name."""

    picture: Tensor | None
    lines: Sequence[str]


@dataclass(frozen=True)
class Band:
    """Cells side by side below a heading."""

    heading: str
    cells: Sequence[Cell]


def sheet(bands: Sequence[Band], notes: Sequence[str], side: int) -> Tensor:
    """The bands one below the other, every picture pixel by pixel; uint8 (3, H, W).

    Args:
        notes: lines at the foot, broken where they are wider than the sheet. side: S of all pictures.
    """
    plain, larger = ImageFont.load_default(SIZE), ImageFont.load_default(SIZE + 2)
    lines = [line for band in bands for cell in band.cells for line in cell.lines]
    width = max([side, *(round(larger.getlength(line)) for line in lines)])  # of a column
    whole = max(len(band.cells) for band in bands) * (width + GAP) - GAP
    foot = [line for note in notes for line in _broken(note, plain, whole)]
    tall = [2 * GAP + LINE + side + LINE * max(len(cell.lines) for cell in band.cells) for band in bands]
    height = sum(tall) + GAP * len(bands) + LINE * len(foot)
    image = Image.new("RGB", (whole + 2 * MARGIN, height + 2 * MARGIN), BACKGROUND)
    draw, top = ImageDraw.Draw(image), MARGIN
    for band, step in zip(bands, tall, strict=True):
        draw.text((MARGIN, top), band.heading, SOFT, plain)
        for column, cell in enumerate(band.cells):
            _place(image, draw, cell, (MARGIN + column * (width + GAP), top + LINE + GAP), side, (larger, plain))
        top += step + GAP
    for i, line in enumerate(foot):
        draw.text((MARGIN, top + LINE * i), line, SOFT, plain)
    return to_tensor(image)


def _place(image: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, at: tuple[int, int], side: int, fonts) -> None:
    left, top = at
    if cell.picture is None:
        draw.rectangle((left, top, left + side - 1, top + side - 1), EMPTY)
    else:
        image.paste(to_pillow(cell.picture), at)
    larger, plain = fonts
    for i, line in enumerate(cell.lines):
        place = (left, top + side + GAP // 2 + LINE * i)
        draw.text(place, line, SOFT if i else INK, plain if i else larger)


def _broken(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterable[str]:
    """The words of a text in lines no wider than `width`."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            yield line
            longer = word
        line = longer
    yield line
