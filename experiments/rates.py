"""One model at several rates: inference.py once per quality, then a table of means and a chart for every score."""

import argparse
import json

from coding import batch, options
from coding.batch import TABLES
from coding.report import COLUMNS, aligned_table
from coding.table import write_rows
from experiments.inputs import photographs
from measuring.charts import Curve, chart
from measuring.scores import unavailable
from utils.errors import DiffoError


def run(args: argparse.Namespace) -> None:
    """Files and tables below --out_path by quality, their means in rates.csv, and a chart for every score.

    Raises:
        DiffoError: an option is wrong, before anything is coded; or a picture could not be coded.
    """
    photographs(args.data)
    for metric in args.metrics:
        unavailable(metric)  # unknown names stop here
    runs = {quality: options.parse(_command(args, quality)) for quality in args.qualities}
    rows = []
    for quality, named in runs.items():
        if batch.run(named):
            raise DiffoError(f"--quality {quality}: not every picture could be coded; the errors are above")
        rows.append({"quality": quality} | json.loads((named.out_path / TABLES[1]).read_text())["mean"])
        rows[-1].pop("picture")
    write_rows(rows, args.out_path / "rates.csv")
    for metric in ("psnr", "ms_ssim", *args.metrics):
        points = [(row["bpp"], row[metric]) for row in rows if row.get(metric) is not None]
        if points:
            x, y = zip(*points, strict=True)
            name = COLUMNS.get(metric, (metric,))[0]
            title = f"{name} by rate: one model, mean over {args.data.name}"
            chart([Curve(name, x, y)], args.out_path / f"{metric}.png", "bits per pixel (files)", name, title)
    print(aligned_table(rows))


def _command(args: argparse.Namespace, quality: str) -> list[str]:
    flags = ["-i", args.data, "-o", args.out_path / f"quality_{quality}", "--quality", quality, "--one_step", "--ddim"]
    flags += ["--overwrite", "--recursive", "--device", args.device, "--metrics", *args.metrics]
    flags += ["--weights", args.weights] if args.weights else []
    return [str(flag) for flag in flags]
