"""What a command leaves beside its rows: their means with intervals as CSV, JSON, Markdown and on the terminal."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from coding.report import COLUMNS, Row, align
from coding.table import write_json, write_rows
from experiments.baselines import BASELINES
from experiments.published import KINDS, published
from measuring.charts import bars
from measuring.intervals import HIGH, LOW, Interval, bootstrap
from measuring.patches import DISTANCES
from measuring.scores import SCORES
from utils.files import atomic_write

SHOWN = SCORES | DISTANCES  # what has a heading, a convention, and a side that is better
SIZES = ("bytes", "payload_bytes", "bpp", "eta")
KIND = "paper's kind"  # a key of experiments.published.KINDS
PAPER = "paper_"  # begins the columns of what the paper printed
BD_RATE, CHANGE = "bd-rate-", "change-of-"  # begin columns of a score's BD-rate, and of its change from a reference

HEADINGS = {
    "label": "variant",
    "changes": "what it changes",
    "reached": "pictures reached",
    "scale": "mean scale",
    "floor_bytes": "smallest file where not reached, bytes",
    "payload_bytes": "bytes without container",
    "bpp": "bits per pixel",
    "eta": "noise level eta",
    "encode_s": "encode, s ↓",
    "decode_s": "decode, s ↓",
    "ms": "median, ms ↓",
}
TERMINAL = 150  # characters of a line that are still read
DECIMALS = {"bpp": 4, "eta": 3, "scale": 2}
CODE = ("command", "commit", "weights")  # what a table says of these is code, the rest are words


def mean_of(rows: Sequence[Row], scores: Sequence[str]) -> Row:
    """Means over the pictures of one codec and label; a mean is over all of them, or it is not there.

    `reached` counts the pictures for which there is a file; `scale` is the mean share of their sides that was coded;
    `floor_bytes` is the mean of the smallest files of the pictures that were not reached.
    """
    mean: Row = {"codec": rows[0]["codec"], "label": rows[0]["label"], "pictures": len(rows)}
    mean["reached"] = sum(row["bytes"] is not None for row in rows)
    scales = [row["scale"] for row in rows if row.get("scale")]
    mean["scale"] = fmean(scales) if scales else None
    floors = [row["floor_bytes"] for row in rows if row["bytes"] is None]
    mean["floor_bytes"] = fmean(floors) if floors else None
    for name in SIZES:
        values = [row.get(name) for row in rows]
        mean[name] = None if None in values else fmean(values)
    for name in scores:
        if interval := bootstrap([row.get(name) for row in rows]):
            mean |= {name: interval.mean, name + LOW: interval.low, name + HIGH: interval.high}
    return mean


def beside_paper(means: Sequence[Row], source: str, **only: str) -> list[Row]:
    """The rows with what the paper printed for their labels, and how that came to us; and those that it alone has.

    Args:
        source: of the records in `experiments.published`, for instance paper-table2. only: which of them, as there.
    """
    records = {record.variant: record for record in published(source=source, **only)}
    values = {variant: record.scores | {"bpp": record.bpp} for variant, record in records.items()}
    shown = {key for printed in values.values() for key in printed}
    rows = []
    for mean in [
        *means,
        *({"codec": "paper alone", "label": v} for v in records if v not in {m["label"] for m in means}),
    ]:
        record, printed, row = records.get(mean["label"]), values.get(mean["label"], {}), {}
        for key in dict.fromkeys([*mean, *printed]):
            row[key] = mean.get(key)
            if key in shown:
                row[PAPER + key] = printed.get(key)
        rows.append(row | {KIND: record.kind} if record else row)
    return rows


def origin(source: str) -> str:
    """Where the values of the paper are from, what limits them, and what they were measured on, if that is told."""
    record = published(source=source)[0]
    return "; ".join(filter(None, (record.where, record.note, record.hardware)))


def heading(column: str) -> str:
    """A column's name for readers: the score's, with its unit and which way is better."""
    name = column.removeprefix(PAPER)
    plain = name.removeprefix(BD_RATE).removeprefix(CHANGE)
    if score := SHOWN.get(plain):
        told = f"{score.heading} {score.unit}".strip() + (" ↓" if score.lower_is_better else " ↑")
    else:
        told = HEADINGS.get(name) or (COLUMNS.get(name) or (name.replace("_", " "),))[0]
    told = f"BD-rate by {score.heading}, % ↓" if name.startswith(BD_RATE) else told
    told = f"change of {told}" if name.startswith(CHANGE) else told
    return f"{told.replace(' (luma)', '')}, paper" if column != name else told  # papers do not say of which channels


def codec_label(name: str) -> str:
    """A codec's name for readers."""
    return BASELINES[name].label if name in BASELINES else name


def label_words(label: str) -> str:
    """A row's label for readers: `40` is a quality, `0.05bpp` a budget; `at 40` stands for the bytes taken there."""
    label = re.sub(r"^(at )?(\S+)bpp\b", r"\1\2 bits per pixel", label)
    label = re.sub(r"^(at )?(?=[\d.]+( by payload)?$)", r"\1quality ", label)
    return re.sub("^at ", "at the bytes of ", label)


def write_summary(rows: Sequence[Row], folder: Path, name: str, about: dict, title: str, **more: object) -> None:
    """`<name>.csv`, `.json`, with `more`, and `.md` of finished rows, printed as well."""
    columns = filled(rows)
    write_rows(rows, folder / f"{name}.csv", columns)
    write_json({"title": title, "about": about, "rows": list(rows)} | more, folder / f"{name}.json")
    told = [f"# {title}", "", *markdown(lines_of(rows)), ""]
    told += [f"- {key}: {_words(value, code=key in CODE)}" for key, value in about.items() if value is not None]
    if any(key.endswith(LOW) for key in columns):
        told.append("- in brackets: 95 % intervals, of means by bootstrap over pictures")
    told += [f"- {heading(key)}: {SHOWN[key].convention}" for key in columns if key in SHOWN]
    told += [f"- {kind}: {KINDS[kind]}" for kind in dict.fromkeys(row[KIND] for row in rows if KIND in row)]
    atomic_write(folder / f"{name}.md", ("\n".join(told) + "\n").encode(errors="backslashreplace"))
    print(align(upright(lines_of(rows, intervals=False))))
    print(f"written to {folder}: {name}.csv, {name}.json, {name}.md")


def upright(lines: list[list[str]]) -> list[list[str]]:
    """The same table with a line for each column, where that is more readable on a terminal: few rows of many columns."""
    width = max(len("  ".join(line)) for line in lines)
    return list(map(list, zip(*lines, strict=True))) if width > TERMINAL and len(lines) <= len(lines[0]) else lines


def filled(rows: Sequence[Row]) -> list[str]:
    """Columns that any row fills, in the rows' own order."""
    columns = dict.fromkeys(key for row in rows for key in row)
    return [key for key in columns if any(row.get(key) is not None for row in rows)]


def draw_bars(
    rows: Sequence[Row], folder: Path, columns: Sequence[str], names: Sequence[str], title: str, stem: str = ""
) -> None:
    """A bar chart for each of these columns that a row fills, `<stem><column>.png` and `.pdf`.

    Args:
        names: columns whose words together name a row's bar.
    """
    for key in (key for key in filled(rows) if key in columns):
        found = [row for row in rows if row.get(key) is not None]
        values = {
            " ".join(_number(n, r[n]) for n in names): Interval(r[key], r.get(key + LOW), r.get(key + HIGH))
            for r in found
        }
        bars(values, folder / f"{stem}{key}.png", heading(key), title)


def lines_of(rows: Sequence[Row], intervals: bool = True) -> list[list[str]]:
    """The rows as cells in words, headings first; intervals stand in brackets after their mean, or are left out."""
    columns = [key for key in filled(rows) if not key.endswith((LOW, HIGH))]
    lines = [[heading(key) for key in columns]]
    for row in rows:
        ends = {key: (row.get(key + LOW), row.get(key + HIGH)) for key in columns if intervals}
        brackets = {key: f" [{_number(key, a)}, {_number(key, b)}]" for key, (a, b) in ends.items() if a is not None}
        lines.append([_number(key, row.get(key)) + brackets.get(key, "") for key in columns])
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first ones are its headings."""
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in ruled]


def _number(key: str, value: str | int | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        words = {"label": label_words, "codec": codec_label}.get(key)
        return words(value) if words else value
    key = key.removeprefix(PAPER)
    sign = "+" if key.startswith((BD_RATE, CHANGE)) else ""
    if isinstance(value, int) or key.endswith("bytes"):
        return f"{value:{sign},.0f}"
    if key.startswith(BD_RATE):
        return f"{value:+.2f}"
    if score := SHOWN.get(key.removeprefix(CHANGE)):
        return f"{value:{sign}.{score.decimals}f}"
    return f"{value:.{DECIMALS[key]}f}" if key in DECIMALS else f"{value:.4g}"


def _words(value: object, code: bool = False) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item, code)}" for key, item in value.items()) or "none"
    return f"`{value}`" if code else str(value)
