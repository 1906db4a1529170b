"""Charts of lines, drawn with Matplotlib, and sheets of originals beside decoded pictures, drawn with Pillow."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from measuring.intervals import Interval
from utils.files import atomic_path
from utils.images import to_pillow, to_tensor, write_image

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.figure import Figure

COLUMN, MARGIN, CAPTION = 512, 24, 36  # pixels; pictures fit a square as wide as a column: portraits stay as large
# Curves are told apart without colour: neighbours differ by marker, dashes and lightness.
MARKERS = "os^vDPX<>*"
LINES = ("-", (0, (5, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (2, 1)), (0, (7, 1.5, 1, 1.5, 1, 1.5)))
PANELS = 4  # side by side
LIGHTEST = 0.8  # of viridis: yellow does not show on white

Row = tuple[torch.Tensor, torch.Tensor, str, str]


@dataclass(frozen=True)
class Curve:
    """One line: its label, x and y, optionally the x of a point to mark on it, and whether it was measured here.

    Those that were not are drawn hollow, dotted and thin, below the others and in shades of their own.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    mark: float | None = None
    measured: bool = True


def chart(
    curves: Sequence[Curve], path: str | os.PathLike[str], x: str, y: str, title: str, log_x: bool = False
) -> None:
    """Draw the curves as a PNG file at `path`, and as a PDF file beside it; the first is the darkest, and lies on top.

    Args:
        x, y: names of the axes, with units.
    Raises:
        DiffoError: the folder of `path` cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    for measured in (True, False):
        alike = [curve for curve in curves if curve.measured == measured]
        shades = matplotlib.colormaps["viridis"](np.linspace(0, LIGHTEST, len(alike)))
        for i, (curve, shade) in enumerate(zip(alike, shades, strict=True)):
            look = {"marker": MARKERS[i % len(MARKERS)], "color": shade, "markersize": 6, "zorder": 3 - i / len(alike)}
            look |= {"linestyle": LINES[i % len(LINES)], "linewidth": 1.8}
            if not measured:
                look |= {"linestyle": ":", "linewidth": 1, "markersize": 5, "markerfacecolor": "white", "zorder": 1}
            axes.plot(curve.x, curve.y, label=curve.label, **look)
            if curve.mark is not None:
                height = np.interp(curve.mark, curve.x, curve.y)
                axes.plot([curve.mark], [height], "D", color=shade, markersize=9, markeredgecolor="black", zorder=4)
    if log_x:
        axes.set_xscale("log")
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        figure.legend(frameon=False, fontsize=9, handlelength=3.6, loc="outside right upper")
    _save(figure, Path(path))


def bars(values: Mapping[str, Interval], path: str | os.PathLike[str], x: str, title: str) -> None:
    """Draw values by name as bars with their intervals, the first on top: a PNG file at `path`, a PDF file beside it.

    Raises:
        DiffoError: the folder of `path` cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.3 * len(values)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, value in values.items():
        ends = None if value.low is None else [[value.mean - value.low], [value.high - value.mean]]
        axes.barh(name, value.mean, xerr=ends, color="0.75", edgecolor="black", capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel=x, title=title)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, Path(path))


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of as many values around each, of those that there are: float64, as many as `values`."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def panels(quantities: Mapping[str, Sequence[Curve]], path: str | os.PathLike[str], x: str, title: str) -> None:
    """Draw curves of noisy values in small panels, by the names of these: a PNG file at `path`, a PDF file beside it.

    Each is drawn thin as it is, and as its running mean over a twentieth of it.

    Raises:
        DiffoError: the folder of `path` cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(quantities) // PANELS)
    figure = Figure(figsize=(3.2 * PANELS, 2.1 * rows + 0.5), dpi=100, layout="constrained")
    grid = figure.subplots(rows, PANELS, squeeze=False).flatten()
    for axes, (name, curves) in zip(grid, quantities.items(), strict=False):
        shades = matplotlib.colormaps["viridis"](np.linspace(0, LIGHTEST, len(curves)))
        for i, (curve, shade) in enumerate(zip(curves, shades, strict=True)):
            window = 2 * (len(curve.y) // 40) + 1  # odd, so that the mean is around its place
            axes.plot(curve.x, curve.y, color=shade, linewidth=0.6, alpha=0.35)
            look = {"color": shade, "linewidth": 1.6, "linestyle": LINES[i % len(LINES)], "label": curve.label}
            axes.plot(curve.x, running_mean(curve.y, window), **look)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=6, handlelength=1.2, ncols=2)
    for axes in grid[len(quantities) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(x, fontsize=9)
    _save(figure, Path(path))


def _save(figure: "Figure", path: Path) -> None:
    for file in (path, path.with_suffix(".pdf")):
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format=file.suffix[1:])


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
    write_image(path, to_tensor(sheet))


def _captioned(picture: torch.Tensor, caption: str) -> Image.Image:
    """A picture centred above its caption, of which nothing is wider than the column."""
    image = to_pillow(picture)
    image.thumbnail((COLUMN, COLUMN), Image.Resampling.LANCZOS)
    whole = Image.new("RGB", (COLUMN, image.height + CAPTION), "white")
    whole.paste(image, ((COLUMN - image.width) // 2, 0))
    font = ImageFont.load_default(18)
    ImageDraw.Draw(whole).text((COLUMN // 2, image.height + CAPTION // 4), caption, "black", font, anchor="ma")
    return whole
