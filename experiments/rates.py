"""Rate against score (Figs. 6 and 8): releases and other codecs on one chart for every score, BD-rates beside it."""

import argparse
from collections.abc import Sequence

from coding.report import Row
from experiments.baselines import BASELINES
from experiments.coded import Coding, Variant, baselines_of, curve_of, measured
from experiments.inputs import about, releases_of
from experiments.summary import write_summary
from measuring.bd_rate import bd_rate
from measuring.charts import Curve, chart
from measuring.scores import SCORES
from models.codec import Codec
from utils.distributed import is_main
from utils.errors import DiffoError


def run(args: argparse.Namespace) -> None:
    """rates.csv by picture, means, bd_rate and a chart for every score.

    Raises:
        DiffoError: an option is wrong, before anything is coded; a picture cannot be read.
    """
    releases = releases_of(args)
    means = points(args, releases)
    if not is_main():
        return
    told = about(args, releases)
    write_summary(means, args.out_path, "means", told, f"Rates and scores on {args.data.name}")
    if args.anchor:
        rows = [{"codec": codec} | bd for codec, bd in bd_rates(means, args.anchor).items()]
        write_summary(rows, args.out_path, "bd_rate", told, f"BD-rate against {args.anchor}, percent")
    draw(means, args)


def points(args: argparse.Namespace, releases: dict[str, Codec]) -> list[Row]:
    """Means of every release at --qualities, and of --codecs at the first one's bytes. Errors as `run`."""
    baselines = baselines_of(args.codecs)
    if args.anchor and args.anchor not in [*releases, *(baseline.name for baseline in baselines)]:
        raise DiffoError(f"--anchor {args.anchor}: not among what is measured here (--weights, --codecs)")
    if clash := sorted(set(releases) & set(BASELINES)):
        raise DiffoError(f"--weights: a release is called {clash[0]}, as another codec is; rename its folder")
    curves = [curve_of(name, codec, args.qualities) for name, codec in releases.items()]
    return measured(args, "rates", releases, [variant for curve in curves for variant in curve], baselines)


def curve(means: Sequence[Row], codec: str, score: str) -> list[tuple[float, float]]:
    """(bpp, score) of a codec's rows that have both, by rate."""
    rows = [row for row in means if row["codec"] == codec]
    return sorted((row["bpp"], row[score]) for row in rows if row.get(score) is not None and row["bpp"] is not None)


def bd_rates(means: Sequence[Row], anchor: str) -> dict[str, Row]:
    """For every codec but the anchor, BD-rate by score in percent, or why there is none, in words."""
    found: dict[str, Row] = {}
    for codec in dict.fromkeys(row["codec"] for row in means if row["codec"] != anchor):
        found[codec] = {}
        for score in (name for name in SCORES if any(name in row for row in means)):
            pair = [curve(means, name, score) for name in (anchor, codec)]
            try:
                found[codec][score] = bd_rate(*pair, lower_is_better=SCORES[score].lower_is_better)
            except DiffoError as error:
                found[codec][score] = str(error)
    return found


def draw(means: Sequence[Row], args: argparse.Namespace) -> None:
    """`<score>.png` and `.pdf` for every score that has a mean."""
    labels = {name: baseline.label for name, baseline in BASELINES.items()}
    for name, score in SCORES.items():
        curves = []
        for codec in dict.fromkeys(row["codec"] for row in means):
            if points := curve(means, codec, name):
                curves.append(Curve(labels.get(codec, codec), *zip(*points, strict=True)))
        if curves:
            title = f"{score.heading} by rate, mean over {args.data.name}"
            unit = f"{score.heading}{', ' + score.unit if score.unit else ''} ({score.better} is better)"
            chart(curves, args.out_path / f"{name}.png", "bits per pixel (files)", unit, title)
