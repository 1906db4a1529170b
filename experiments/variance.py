"""Fig. 9a: how much the size of a file varies from picture to picture, at one setting.

The paper shows the bits per pixel of a set about their mean: indices that cost the same in every picture make the rate
known beforehand, where entropy coding makes it follow the content. DiffEIC, which it shows beside its own, is not run
here: other codecs stand for it, each at the one setting whose mean comes nearest to the first release's.
"""

import argparse
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev

from torch import Tensor

from coding.report import Row
from coding.table import Table
from experiments.baselines import Baseline
from experiments.coded import KEY, Variant, at_quality, baselines_of, fill, table_of
from experiments.inputs import about, checksum, named_photographs, releases_of
from experiments.summary import codec_label, label_words, write_summary
from measuring.charts import Curve, chart
from measuring.metrics import bpp
from models.bitstream import CodedPicture, pack
from models.codec import Codec
from models.entropy_coding import fixed_length_bytes
from utils.distributed import is_main
from utils.images import read_image

FIXED = "base at fixed length"
FROM_MEAN, SHARE = "bits per pixel from the set's mean, %", "pictures up to there, %"  # axes
Size = Callable[[Tensor], int]  # of a picture's file, in bytes


def run(args: argparse.Namespace) -> None:
    """pictures.csv, the spread of every codec's sizes, and their distributions as a chart.

    Raises:
        DiffoError: an option is wrong, before anything is coded; a picture cannot be read.
    """
    releases = releases_of(args)
    others = baselines_of(args.codecs, releases)
    variants = [Variant(n, f"{args.quality:g}", c, at_quality(n, c, args.quality)) for n, c in releases.items()]
    pictures = named_photographs(args.data, args.limit)
    with table_of(args, "pictures", releases) as table:
        measure = partial(sized, table, pictures)
        found = [measure(v.codec, label, made, size) for v in variants for label, made, size in ways_of(v)]
        aim = fmean(row["bytes"] for row in found[0])
        found += [nearest(measure, baseline, aim) for baseline in others]
    if not is_main():
        return
    names = [f"{codec_label(rows[0]['codec'])}, {label_words(rows[0]['label'])}" for rows in found]
    curves = {name: distribution([row["bpp"] for row in rows]) for name, rows in zip(names, found, strict=True)}
    title = f"Fig. 9a: variation of the rate over {args.data.name}"
    told = about(args, releases, bytes="of whole files")
    write_summary([spread_of(rows) for rows in found], args.out_path, "variance", told, title, distributions=curves)
    drawn = [Curve(name, *zip(*points, strict=True)) for name, points in curves.items()]
    chart(drawn, args.out_path / "variance.png", FROM_MEAN, SHARE, title)


def ways_of(variant: Variant) -> Iterator[tuple[str, str, Size]]:
    """Label, what decides the size, and the size: of the file as it is, and of the base alone at fixed length."""
    model, code = variant.model, variant.model.level_code(variant.quality)
    yield variant.label, variant.made_from, lambda image: len(model.write(model.analyse(image), code))
    yield FIXED, variant.made_from, partial(fixed_length_size, model)


def fixed_length_size(codec: Codec, image: Tensor) -> int:
    """Bytes of the base alone, its indices at log2 K bits each: nothing but the picture's size decides them."""
    blank = CodedPicture(*image.shape[1:], codec.fingerprint, b"-", fixed_length=True)
    indices = fixed_length_bytes(math.prod(blank.latent_size), codec.params.vq_base.codebook_size)
    return len(pack(replace(blank, base=bytes(indices))))


def sized(table: Table, pictures: dict[str, Path], codec: str, label: str, made_from: str, size: Size) -> list[Row]:
    """The rows of one codec and label, with the sizes of the files; those that the table has are not coded again."""
    made = {name: f"{made_from}, picture {checksum(path)}" for name, path in pictures.items()}

    def measured(name: str) -> list[Row]:
        image = read_image(pictures[name])
        row: Row = dict(zip(KEY, (codec, label, name), strict=True)) | {"bytes": size(image), "made_from": made[name]}
        return [row | {"bpp": bpp(row["bytes"], *image.shape[1:])}]

    todo = [name for name in pictures if (table.get(codec, label, name) or {}).get("made_from") != made[name]]
    fill(table, [partial(measured, name) for name in todo], f"{codec_label(codec)}, {label_words(label)}")
    return [table.get(codec, label, name) for name in pictures]


def nearest(measure: Callable[..., list[Row]], baseline: Baseline, aim: float) -> list[Row]:
    """The rows of another codec at the one setting, at full size, whose files come nearest to `aim` bytes in the mean."""

    @cache
    def rows(setting: int) -> list[Row]:
        words = baseline.setting.format(setting)
        return measure(baseline.name, words, words, lambda image: len(baseline.at(image, setting).data))

    def mean(setting: int) -> float:
        return fmean(row["bytes"] for row in rows(setting))

    above = bisect_left(baseline.settings, aim, hi=len(baseline.settings) - 1, key=mean)
    around = baseline.settings[max(above - 1, 0) : above + 1]
    return rows(min(around, key=lambda setting: abs(mean(setting) - aim)))


def spread_of(rows: Sequence[Row]) -> Row:
    """Mean and spread of the bits per pixel of a row's pictures; one picture has no spread."""
    rates = [row["bpp"] for row in rows]
    mean, deviation = fmean(rates), stdev(rates) if len(rates) > 1 else None
    return {
        "codec": rows[0]["codec"],
        "label": rows[0]["label"],
        "pictures": len(rows),
        "bpp": mean,
        "standard deviation, bits per pixel": deviation,
        "of the mean, %": None if deviation is None else 100 * deviation / mean,
        "least, bits per pixel": min(rates),
        "largest, bits per pixel": max(rates),
    }


def distribution(rates: Sequence[float]) -> list[tuple[float, float]]:
    """Points of the cumulative distribution: each rate's distance from the mean, and the share up to it, in percent."""
    mean, count = fmean(rates), len(rates)
    return [(100 * (rate / mean - 1), 100 * (i + 0.5) / count) for i, rate in enumerate(sorted(rates))]
