"""Rows of measurements, their columns and means, and the table that is printed of them."""

import math
import statistics
from collections.abc import Sequence

# column -> (heading, format) in the printed table, or None: it should fit a terminal, and leaves those to the files.
# Scores have those of SCORES.
COLUMNS = {
    **{name: (name, "s") for name in ("codec", "label", "picture")},
    "output": None,
    **{name: (name, "d") for name in ("width", "height")},
    "scale": ("scale", ".4g"),
    "bytes": ("bytes", "d"),
    "bpp": ("bpp", ".4f"),
    "code": ("level/255", "d"),
    **dict.fromkeys(f"{part}_bits" for part in ("header", "base", "hyper", "residual", "check", "estimated")),
    "fixed_length_base_bits": None,
    "steps": ("steps", "d"),
    "eta": ("noise eta", ".3f"),
    **dict.fromkeys(("psnr", "ms_ssim")),
    **{f"error_{name[0]}": (f"{name} error", "+.2f") for name in ("red", "green", "blue")},
    "encode_s": ("encode s", ".2f"),
    "write_s": None,
    "decode_s": ("decode s", ".2f"),
    "read_s": None,
    "note": ("note", "s"),
}
WITHOUT_MEAN = ("picture", "width", "height", "steps")
EXPLAINED = ("ms_ssim",)  # columns that are kept where no row has a value: the note says why

Row = dict[str, str | int | float | None]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Columns that any row fills, in their order; extra metrics last."""
    extra = [name for row in rows for name in row if name not in COLUMNS]
    filled = {name for row in rows for name, value in row.items() if value is not None or name in EXPLAINED}
    return [name for name in [*COLUMNS, *dict.fromkeys(extra)] if name in filled]


def mean_row(rows: Sequence[Row]) -> Row:
    """Means of the numeric columns. A mean is over all rows or not there: a score that some lack, or not finite, has none."""
    mean: Row = {"picture": f"mean of {len(rows)}"}
    for name in columns_of(rows):
        values = [row.get(name) for row in rows]
        if name not in WITHOUT_MEAN and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            mean[name] = statistics.fmean(values)
    return mean


def intervals_of(rows: Sequence[Row]) -> Row:
    """Ends of the 95 % intervals of the scores' means, by bootstrap over the rows: of those that have a mean."""
    from measuring.intervals import HIGH, LOW, bootstrap  # here, as below
    from measuring.scores import SCORES

    found = {name: bootstrap([row.get(name) for row in rows]) for name in SCORES}
    found = {name: each for name, each in found.items() if each and each.low is not None}
    return {name + end: value for name, each in found.items() for end, value in ((LOW, each.low), (HIGH, each.high))}


def aligned_table(rows: list[Row]) -> str:
    """Rows as aligned text under the columns' headings."""
    from measuring.scores import SCORES  # here, because it imports torch: wrong usage is answered before

    scores = {name: (f"{score.heading} {score.unit}".strip(), f".{score.decimals}f") for name, score in SCORES.items()}
    shown = {name: (COLUMNS | scores)[name] for name in columns_of(rows)}
    shown = {name: column for name, column in shown.items() if column}
    lines = [[heading for heading, _ in shown.values()]]
    lines += [[_cell(row.get(name), form) for name, (_, form) in shown.items()] for row in rows]
    return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Cells as aligned text: a rule below the first line, which has the headings; the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    form = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    return "\n".join([form.format(*lines[0]), rule, *(form.format(*line) for line in lines[1:])])


def _cell(value: str | int | float | None, form: str) -> str:
    return "-" if value is None else format(value, ".1f" if form == "d" and isinstance(value, float) else form)
