"""The table of a coding run: one row per picture, printed, and written as CSV and JSON."""

import csv
import io
import json
import math
import statistics
from pathlib import Path

from utils.files import atomic_write

# column -> (heading in the printed table, format)
COLUMNS = {
    "quality": ("quality", "s"),
    "weights": ("weights", "s"),
    "picture": ("picture", "s"),
    "width": ("width", "d"),
    "height": ("height", "d"),
    "bytes": ("bytes", "d"),
    "bpp": ("bpp", ".4f"),
    "level": ("level", "d"),
    "header_bits": ("header bits", "d"),
    "base_bits": ("base bits", "d"),
    "hyper_bits": ("hyper bits", "d"),
    "residual_bits": ("residual bits", "d"),
    "check_bits": ("check bits", "d"),
    "estimated_bits": ("estimate", ".1f"),
    "fixed_length_base_bits": ("fixed base", "d"),
    "steps": ("steps", "d"),
    "eta": ("eta", ".3f"),
    "psnr": ("PSNR dB", ".2f"),
    "ms_ssim": ("MS-SSIM", ".4f"),
    "won": ("won", "s"),
    "error_r": ("err R", "+.2f"),
    "error_g": ("err G", "+.2f"),
    "error_b": ("err B", "+.2f"),
    "encode_s": ("enc s", ".2f"),
    "write_s": ("of it coding", ".3f"),
    "decode_s": ("dec s", ".2f"),
    "read_s": ("of it coding", ".3f"),
    "note": ("note", "s"),
}
# Columns of the files that the printed table leaves out: it should fit a terminal.
FILES_ONLY = [name for name in COLUMNS if name.endswith("_bits")] + ["write_s", "read_s"]
WITHOUT_MEAN = ("picture", "width", "height", "steps")

TABLES = ["metrics.csv", "metrics.json"]

Row = dict[str, str | int | float | None]


def columns_of(rows: list[Row]) -> list[str]:
    """Columns that any row fills, in their order; extra metrics last."""
    extra = [name for row in rows for name in row if name not in COLUMNS]
    return [name for name in [*COLUMNS, *dict.fromkeys(extra)] if any(row.get(name) is not None for row in rows)]


def mean_row(rows: list[Row]) -> Row:
    """Means of the numeric columns. A mean is over all rows or not there: a score that some lack, or not finite, has none."""
    mean: Row = {"picture": f"mean of {len(rows)}"}
    for name in columns_of(rows):
        values = [row.get(name) for row in rows]
        if name not in WITHOUT_MEAN and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            mean[name] = statistics.fmean(values)
    return mean


def aligned_table(rows: list[Row]) -> str:
    """Rows as aligned text under the columns' headings."""
    names = [name for name in columns_of(rows) if name not in FILES_ONLY]
    lines = [[COLUMNS.get(name, (name,))[0] for name in names]]
    lines += [[_cell(name, row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    form = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    return "\n".join([form.format(*lines[0]), rule, *(form.format(*line) for line in lines[1:])])


def write_tables(rows: list[Row], folder: Path, about: dict) -> None:
    """metrics.csv (one line per picture) and metrics.json (the same, their mean, and how they were made)."""
    write_rows(rows, folder / TABLES[0])
    content = {"about": about, "mean": mean_row(rows), "pictures": rows}
    atomic_write(folder / TABLES[1], (json.dumps(_plain(content), indent=1) + "\n").encode())


def write_rows(rows: list[Row], path: Path) -> None:
    """The rows as CSV."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns_of(rows), restval="", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    atomic_write(path, text.getvalue().encode(errors="backslashreplace"))  # names of files need not be text


def _cell(name: str, value: str | int | float | None) -> str:
    if value is None:
        return "-"
    form = COLUMNS.get(name, ("", ".4f"))[1]
    if form == "d" and isinstance(value, float):
        form = ".1f"
    return format(value, form)


def _plain(value):
    """JSON has no infinity: equal pictures have a PSNR of null."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
