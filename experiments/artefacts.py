"""What decoding adds that no picture has, by release and quality: patterns, bad borders, a colour cast, flat areas."""

import argparse
import math
from pathlib import Path
from statistics import fmean

import torch

from coding.report import Row
from experiments.coded import Variant, curve_of, measured
from experiments.inputs import about, named_photographs, releases_of
from experiments.summary import write_summary
from measuring.artefacts import border_errors, lines
from measuring.metrics import colour_shift
from utils.distributed import is_main
from utils.images import read_image

FLAT = {"black": 0, "grey": 128, "white": 255}
SIDE = 256


def run(args: argparse.Namespace) -> None:
    """pictures.csv, and a row for each release and quality.

    Raises:
        DiffoError: an option is wrong, before anything is coded; a picture cannot be read.
    """
    releases = releases_of(args, args.decoder)
    variants = [v for name, codec in releases.items() for v in curve_of(name, codec, args.qualities)]
    means = measured(args, "pictures", releases, variants)
    if not is_main():
        return
    pictures = {name: read_image(path) for name, path in named_photographs(args.data, args.limit).items()}
    rows = []
    for variant, mean in zip(variants, means, strict=True):
        folder = args.out_path / "decoded" / variant.codec / variant.label
        row = {"codec": variant.codec, "label": variant.label, "bytes": mean["bytes"]}
        rows.append(
            row | found(pictures, folder) | {f"{name}, largest error": flat(variant, v) for name, v in FLAT.items()}
        )
    title = f"Artefacts, {args.data.name}"
    write_summary(rows, args.out_path, "artefacts", about(args, releases, meaning=MEANING), title)


MEANING = {
    "line": "power of the mean error spectrum at the multiple of 1/16 cycles per pixel that stands out most, over its neighbours'; pictures from 192 pixels",
    "border / middle": "RMSE of the outer 4 pixels over that of the rest",
    "cast": "mean of decoded minus original, grey values",
    "largest error": f"of a flat picture of {SIDE}x{SIDE} pixels, grey values",
}


def found(pictures: dict[str, torch.Tensor], folder: Path) -> Row:
    """Artefacts of a set as it was decoded into `folder`, a PNG for each of the pictures by name."""
    pairs = [(image, read_image(folder / f"{Path(name).with_suffix('')}.png")) for name, image in pictures.items()]
    row: Row = {}
    for axis, (frequency, ratio) in lines(pairs).items():
        row |= {f"line along {axis}": ratio, f"cycles per pixel along {axis}": frequency}
    border, middle = (fmean(errors) for errors in zip(*(border_errors(*pair) for pair in pairs), strict=True))
    row["border / middle"] = math.sqrt(border / middle) if middle else None
    shifts = zip(*(colour_shift(*pair) for pair in pairs), strict=True)
    return row | {f"cast {channel}": fmean(shift) for channel, shift in zip("RGB", shifts, strict=True)}


def flat(variant: Variant, value: int) -> int:
    """The largest error of a picture of one grey value, coded and decoded."""
    picture = torch.full((3, SIDE, SIDE), value, dtype=torch.uint8)
    model = variant.model
    decoded = model.decode(model.write(model.analyse(picture), model.level_code(variant.quality)), variant.sampling)
    return (decoded.image.int() - value).abs().max().item()
