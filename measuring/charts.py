"""Charts of lines, drawn with Matplotlib."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from utils.files import atomic_path


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
