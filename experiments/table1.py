"""Table 1: BD-rate, parameters, seconds to encode and to decode a picture of 768x768."""

import argparse
from pathlib import Path

from coding.report import Row
from datapipe.sources import demo_photographs
from experiments.coded import COUNTED, at_quality, table_of
from experiments.inputs import about, releases_of
from experiments.published import OURS, Published, published
from experiments.rates import anchor_of, bd_rates, points
from experiments.summary import BD_RATE, KIND, PAPER, codec_label, draw_bars, origin, write_summary
from experiments.timing import TOTAL, made_from, measure
from models.codec import Codec
from utils.distributed import is_main

SIZE = "768x768"


def run(args: argparse.Namespace) -> None:
    """The rows of `rates` in rates.csv, and the table: ours beside the paper's, whose BD-rates have another anchor.

    Raises:
        DiffoError: an option is wrong, before anything is coded.
    """
    releases = releases_of(args, args.decoder)
    for name, codec in releases.items():
        at_quality(name, codec, args.quality)
    means = points(args, releases)
    if not is_main():
        return
    anchor = anchor_of(args)
    bd, reasons = bd_rates(means, anchor) if anchor else ({}, {})
    paper = {record.system: record for record in published(source="paper-table1")}
    rows, picture = [], demo_photographs()[0]
    with table_of(args, "seconds", releases, ("codec",)) as table:
        for name, codec in releases.items():
            made = made_from(codec, picture, args)
            if (table.get(name) or {}).get("made_from") != made:
                table.add({"codec": name, "made_from": made} | seconds(codec, picture, args))
            row: Row = {"codec": name} | bd.get(name, {}) | {"parameters": sum(p.numel() for p in codec.parameters())}
            row |= {key: table.get(name)[key] for key in ("encode_s", "decode_s")}
            rows.append(row | printed(paper[OURS]))
    rows += [{"codec": codec} | row for codec, row in bd.items() if codec not in releases]
    rows += [
        {"codec": f"{system} (paper alone)"} | printed(record) for system, record in paper.items() if system != OURS
    ]
    told = about(
        args,
        releases,
        anchor=anchor,
        size=SIZE,
        repeats=args.repeats,
        bytes=COUNTED[args.by],
        paper=origin("paper-table1"),
    )
    against = f"BD-rate against {codec_label(anchor)} (the paper's against CDC), " if anchor else ""
    title = f"Table 1: {against}size and speed"
    write_summary(rows, args.out_path, "table1", told | reasons, title)
    draw_bars(rows, args.out_path, [BD_RATE + name for name in args.metrics], ("codec",), title)


def seconds(codec: Codec, picture: Path, args: argparse.Namespace) -> Row:
    """Medians of `timing` over all parts of either way, file I/O among them."""
    rows = measure(codec, picture, SIZE, args)
    return {f"{row['way']}_s": row["ms"] / 1e3 for row in rows if row["part"] == TOTAL}


def printed(record: Published) -> Row:
    """A record's values in the columns of the paper."""
    values = record.scores | {key: getattr(record, key) for key in ("parameters", "encode_s", "decode_s")}
    return {PAPER + key: value for key, value in values.items()} | {KIND: record.kind}
