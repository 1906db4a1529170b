"""The report: one page, whole in itself, of what the other commands left: pictures to compare, curves and tables."""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path

from coding.report import Row
from experiments import rates
from experiments.baselines import BASELINES
from experiments.coded import COUNTED
from experiments.compared import compared
from experiments.eta import rate_label
from experiments.inputs import demo_folder
from experiments.published import OURS, published
from experiments.rates import published_curves
from experiments.summary import HIGH, KIND, LOW, codec_label, heading, label_words, lines_of
from experiments.variance import FROM_MEAN, SHARE
from measuring.scores import SCORES
from utils.distributed import is_main
from utils.errors import DiffoError
from utils.files import atomic_write

ALIKE = "table1 table2 branches eta variance ablation ceiling artefacts crops timing equal_bytes".split()
# command -> the tables that it leaves, in the order of the page
TABLES = {"rates": ("means", "bd_rate")} | {name: (name,) for name in ALIKE}
DEMO = {
    "qualities": (0.0, 20.0, 100.0),
    "bpp": (),
    "metrics": ("psnr", "ms_ssim", "stlpips-alex", "nlpd"),
    "codecs": ("jpeg2000", "webp", "avif", "heic", "jxl"),
    "decoder": ("full",),
    "rdo": None,
}
PICTURES = 24  # on the page where no --limit is given: of Kodak, under 25 MB
PAGE = Path(__file__).with_name("page")  # its parts
BY_RATE = {"x": "bits per pixel (of whole files)", "unit": "bpp"}


def run(args: argparse.Namespace) -> None:
    """report.html in --out_path, of the commands' folders there; with --demo, of demo photographs coded first.

    Raises:
        DiffoError: an option is wrong, or a table is damaged; there is nothing to report.
    """
    if args.demo and args.data:
        raise DiffoError("--demo brings its own pictures; leave out --data")
    folder, data = args.out_path, args.data
    if args.demo:
        folder = args.out_path / "report-demo"
        data = code_demo(args, folder)
    if not is_main():
        return
    tables = {command: tables_of(folder / command, names) for command, names in TABLES.items()}
    tables = {command: found for command, found in tables.items() if found}
    if not tables:
        raise DiffoError(f"{folder}: no results there; `python reproduce.py rates --data PICTURES` leaves some")
    content = {"date": date.today().isoformat(), "command": args.command} | content_of(folder, tables, data, args)
    path = args.out_path / "report.html"
    atomic_write(path, page(content).encode())
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB: open it in a browser")


def code_demo(args: argparse.Namespace, folder: Path) -> Path:
    """`rates` of scikit-image's photographs by the release that ships, below a folder; returns that of the pictures."""
    data = demo_folder(folder / "photographs")
    told = {
        "weights": None,
        "data": data,
        "limit": None,
        "anchor": None,
        "published": None,
        "distances": (),
        "by": "file",
    }
    rates.run(argparse.Namespace(**vars(args) | told | DEMO | {"out_path": folder / "rates"}))
    return data


def tables_of(folder: Path, names: Sequence[str]) -> dict[str, dict]:
    """The tables of a command that are in its folder, by name, as `write_summary` wrote them."""
    return {name: read(folder / f"{name}.json", "title") for name in names if (folder / f"{name}.json").is_file()}


def read(path: Path, key: str) -> dict:
    """A JSON table with this key. Raises DiffoError if it is not one."""
    try:
        content = json.loads(path.read_bytes())
        content[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiffoError(f"{path}: not a table of reproduce.py; run its command again") from error
    return content


def content_of(folder: Path, tables: dict[str, dict[str, dict]], data: Path | None, args: argparse.Namespace) -> dict:
    """Everything that the page shows, as plain data. Errors as `run`."""
    every = [table for found in tables.values() for table in found.values()]
    scores = {
        name: {"heading": heading(name), "decimals": score.decimals, "lower": score.lower_is_better}
        for name, score in SCORES.items()
    }
    content = {"title": every[0]["title"], "about": every[0]["about"], "caution": caution(every[0]["about"])}
    content |= {"scores": scores, "codecs": {name: baseline.label for name, baseline in BASELINES.items()}}
    content["groups"] = list(groups_of(tables))
    content["tables"] = [
        {"title": table["title"], "lines": lines_of(table["rows"]), "about": table["about"]} for table in every
    ]
    if means := tables.get("rates", {}).get("means"):
        if data is None:
            raise DiffoError(f"name the originals with --data; they were coded by: {means['about']['command']}")
        rows = read(folder / "rates" / "rates.json", "pictures")["pictures"]
        measured = [mean for mean in means["rows"] if KIND not in mean]  # the paper's have no files
        content["compared"] = compared(folder / "rates", rows, measured, data, args.limit or PICTURES)
    return content


def caution(about: dict) -> str | None:
    """How the sizes of the measured releases relate to the paper's; None of results that do not tell their sizes."""
    (paper,) = (record.parameters for record in published(source="paper-table1") if record.system == OURS)
    counts = about.get("parameters")
    if not counts:
        return None
    told = " and ".join(f"{name} has {count / 1e6:.1f} million parameters" for name, count in counts.items())
    told += f"; the paper's model has {paper / 1e6:.0f} million."
    if all(count < paper / 2 for count in counts.values()):
        told += " These are numbers of a small model: they do not tell what the method reaches at the paper's size."
    return told


def groups_of(tables: dict[str, dict[str, dict]]) -> Iterator[dict]:
    """Charts that share a legend: every score by the rate, eta by rate, distributions of the rate."""
    if means := tables.get("rates", {}).get("means"):
        yield {"title": means["title"], "charts": list(score_charts(means["rows"], means["about"]))}
    if eta := tables.get("eta", {}).get("eta"):
        name, swept = eta["about"]["metric"], eta["sweeps"]["fit"]
        curves = [
            curve(rate_label(rate), zip(swept["etas"], scores, strict=True))
            for rate, scores in zip(swept["rates"], swept["scores"], strict=True)
        ]
        axes = {"title": SCORES[name].heading, "x": "noise level eta", "unit": "eta", "y": better(name), "log": True}
        yield {"title": eta["title"], "charts": [axes | {"curves": curves}]}
    if distributions := (variance := tables.get("variance", {}).get("variance", {})).get("distributions"):
        curves = [curve(name, points) for name, points in distributions.items()]
        axes = {"title": "Distribution of the rate", "x": FROM_MEAN, "unit": "% from the mean", "y": SHARE}
        yield {"title": variance["title"], "charts": [axes | {"curves": curves}]}


def score_charts(means: Sequence[Row], about: dict) -> Iterator[dict]:
    """A chart for every score that has a mean, with the published points of a set, which are no measurements."""
    dataset, counted = about.get("published"), about.get("bytes", COUNTED["file"])
    for name, score in SCORES.items():
        curves = []
        for codec in dict.fromkeys(row["codec"] for row in means):
            rows = [row for row in means if row["codec"] == codec and row.get(name) is not None and row["bpp"]]
            points = [(row["bpp"], row[name], described(row, name)) for row in sorted(rows, key=lambda row: row["bpp"])]
            if points:
                curves.append(curve(codec_label(codec), points))
        if curves:
            drawn = published_curves(dataset, name) if dataset else []
            curves += [curve(each.label, zip(each.x, each.y, strict=True), measured=False) for each in drawn]
            axes = BY_RATE | {
                "x": f"bits per pixel ({counted})",
                "title": score.heading,
                "y": better(name),
                "told": score.convention,
            }
            yield axes | {"curves": curves}


def curve(label: str, points: Iterable[tuple], measured: bool = True) -> dict:
    """A curve of points (x, y) or (x, y, what else to say of it)."""
    return {"label": label, "points": list(points), "measured": measured}


def described(row: Row, name: str) -> str:
    """What a point of a mean says beside its place: interval, bytes, quality."""
    low, high = row.get(name + LOW), row.get(name + HIGH)
    decimals = SCORES[name].decimals
    interval = f"95 % interval {low:.{decimals}f} to {high:.{decimals}f}\n" if low is not None else ""
    return f"{interval}{row['bytes']:,.0f} bytes, {label_words(row['label'])}"


def better(name: str) -> str:
    """An axis of a score: its unit, and which way is better."""
    told = "lower is better" if SCORES[name].lower_is_better else "higher is better"
    return f"{SCORES[name].unit}, {told}" if SCORES[name].unit else told


def page(content: dict) -> str:
    """The page as HTML, with style, scripts and data inside."""
    told = json.dumps(content, allow_nan=False).replace("<", "\\u003c")  # no tag can end the script that holds it
    parts = {"style": "style.css", "charts": "charts.js", "enlarge": "enlarge.js", "script": "page.js"}
    html = (PAGE / "page.html").read_text()
    for name, file in parts.items():
        html = html.replace(f"/* {name} */", (PAGE / file).read_text())
    return html.replace("/* data */", told)
