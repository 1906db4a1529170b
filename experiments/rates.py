"""Rate against score (Figs. 6 and 8): releases and other codecs on one chart for every score, BD-rates beside it."""

import argparse
from collections.abc import Sequence

from coding.report import Row
from experiments.baselines import Baseline
from experiments.coded import COUNTED, baselines_of, curve_of, measured
from experiments.inputs import about, releases_of
from experiments.published import published, records
from experiments.summary import BD_RATE, SHOWN, beside_paper, codec_label, origin, write_summary
from measuring.bd_rate import DOUBTFUL, bd_rate, overlap
from measuring.charts import Curve, chart
from models.codec import Codec
from utils.distributed import is_main
from utils.errors import DiffoError

THE_PAPERS = "trained with 2 steps, run with 1"  # the variant of its Table 2 that is the paper's codec


def run(args: argparse.Namespace) -> None:
    """rates.csv by picture, means, bd_rate and a chart for every score.

    Of a set that the paper gives numbers for, its point is a row of the means, in columns of its own: no other row has
    its rate.

    Raises:
        DiffoError: an option is wrong, before anything is coded; a picture cannot be read.
    """
    releases = releases_of(args, args.decoder, args.rdo)
    means = points(args, releases)
    if not is_main():
        return
    rows = beside_paper(means, "paper-table2", dataset=args.published or args.data.name, variant=THE_PAPERS)
    paper = origin("paper-table2") if len(rows) > len(means) else None
    told = about(args, releases, published=args.published, bytes=COUNTED[args.by], paper=paper)
    by = " by payload" if args.by == "payload" else ""
    write_summary(rows, args.out_path, "means", told, f"Rates and scores on {args.data.name}{by}")
    if anchor := anchor_of(args):
        found, reasons = bd_rates(means, anchor)
        rows = [{"codec": codec} | row for codec, row in found.items()]
        write_summary(rows, args.out_path, "bd_rate", told | reasons, f"BD-rate against {codec_label(anchor)}{by}")
    draw(means, args)


def points(args: argparse.Namespace, releases: dict[str, Codec]) -> list[Row]:
    """Means of every release at --qualities or --bpp, and of --codecs at the first one's bytes. Errors as `run`."""
    baselines = baselines_for(args, releases)
    curves = [curve_of(name, codec, args) for name, codec in releases.items()]
    variants = [variant for curve in curves for variant in curve]
    return measured(args, "rates", releases, variants, baselines, args.distances, args.by)


def baselines_for(args: argparse.Namespace, releases: dict[str, Codec]) -> list[Baseline]:
    """The codecs of --codecs that can be had. Raises DiffoError for names that are unknown, or clash."""
    baselines = baselines_of(args.codecs, releases)
    if args.anchor and args.anchor not in [*releases, *(baseline.name for baseline in baselines)]:
        raise DiffoError(f"--anchor {args.anchor}: not among what is measured here (--weights, --codecs)")
    sets = {record.dataset for record in records() if record.bpp and record.dataset}
    if args.published and args.published not in sets:
        raise DiffoError(f"--published {args.published}: no such set; there are {', '.join(sorted(sets))}")
    return baselines


def anchor_of(args: argparse.Namespace) -> str | None:
    """What BD-rates are against: --anchor, or the first of --codecs."""
    return args.anchor or next(iter(args.codecs), None)


def curve(means: Sequence[Row], codec: str, score: str) -> list[tuple[float, float]]:
    """(bpp, score) of a codec's rows that have both, by rate."""
    rows = [row for row in means if row["codec"] == codec]
    return sorted((row["bpp"], row[score]) for row in rows if row.get(score) is not None and row["bpp"] is not None)


def bd_rates(means: Sequence[Row], anchor: str) -> tuple[dict[str, Row], dict[str, str]]:
    """For every codec but the anchor, BD-rate in percent by score; and why some are missing, or doubtful."""
    found: dict[str, Row] = {}
    reasons: dict[str, str] = {}
    for codec in dict.fromkeys(row["codec"] for row in means if row["codec"] != anchor):
        found[codec] = {}
        for score in (name for name in SHOWN if any(name in row for row in means)):
            pair = [curve(means, name, score) for name in (anchor, codec)]
            try:
                found[codec][BD_RATE + score] = bd_rate(*pair, SHOWN[score].lower_is_better)
                if (share := overlap(*pair)) < DOUBTFUL:
                    told = f"doubtful: the two curves have {100 * share:.0f} % of their scores' range in common"
                    reasons[f"{codec_label(codec)}, {SHOWN[score].heading}"] = told
            except DiffoError as error:
                reasons[f"{codec_label(codec)}, {SHOWN[score].heading}"] = str(error)
    return found, reasons


def draw(means: Sequence[Row], args: argparse.Namespace) -> None:
    """`<score>.png` and `.pdf` for every score that has a mean, with the published points of set --published."""
    for name, score in SHOWN.items():
        curves = []
        for codec in dict.fromkeys(row["codec"] for row in means):
            if points := curve(means, codec, name):
                curves.append(Curve(codec_label(codec), *zip(*points, strict=True)))
        if curves:
            curves += published_curves(args.published, name) if args.published else []
            title = f"{score.heading} by rate, mean over {args.data.name}"
            better = "lower" if score.lower_is_better else "higher"
            unit = f"{', '.join(filter(None, (score.heading, score.unit)))}, {better} is better"
            chart(curves, args.out_path / f"{name}.png", f"bits per pixel ({COUNTED[args.by]})", unit, title)


def published_curves(dataset: str, score: str) -> list[Curve]:
    """Points of other codecs as they were published, for one set and score."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in published(dataset, score):
        if record.variant not in ("", THE_PAPERS):
            continue  # an ablation
        label = f"{record.system} ({record.source}: {record.kind})"
        points.setdefault(label, []).append((record.bpp, record.scores[score]))
    return [Curve(label, *zip(*sorted(found), strict=True), measured=False) for label, found in points.items()]
