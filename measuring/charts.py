"""Charts of lines, drawn with Matplotlib, and sheets of originals beside decoded pictures, drawn with Pillow."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from utils.files import atomic_path
from utils.images import write_image

COLUMN, MARGIN, CAPTION = 512, 24, 36  # pixels; pictures fit a square as wide as a column: portraits stay as large

Row = tuple[torch.Tensor, torch.Tensor, str, str]


@dataclass(frozen=True)
class Curve:
    """One line: its label, x and y, and optionally the x of a point to mark on it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    mark: float | None = None


def chart(
    curves: Sequence[Curve], path: str | os.PathLike[str], x: str, y: str, title: str, log_x: bool = False
) -> None:
    """Draw the curves as one PNG file at `path`, darker ones later.

    Args:
        x, y: names of the axes, with units.
    Raises:
        DiffoError: the folder of `path` cannot be written.
    """
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.15 if len(curves) > 1 else 0.7, 1, len(curves)))
    for curve, shade in zip(curves, shades, strict=True):
        axes.plot(curve.x, curve.y, "o-", color=shade, label=curve.label, markersize=4, linewidth=1.6)
        if curve.mark is not None:
            height = np.interp(curve.mark, curve.x, curve.y)
            axes.plot([curve.mark], [height], "D", color=shade, markersize=9, markeredgecolor="black")
    if log_x:
        axes.set_xscale("log")
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


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
    write_image(path, torch.from_numpy(np.array(sheet)).permute(2, 0, 1))


def _captioned(picture: torch.Tensor, caption: str) -> Image.Image:
    """A picture centred above its caption, of which nothing is wider than the column."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((COLUMN, COLUMN), Image.Resampling.LANCZOS)
    whole = Image.new("RGB", (COLUMN, image.height + CAPTION), "white")
    whole.paste(image, ((COLUMN - image.width) // 2, 0))
    font = ImageFont.load_default(18)
    ImageDraw.Draw(whole).text((COLUMN // 2, image.height + CAPTION // 4), caption, "black", font, anchor="ma")
    return whole
