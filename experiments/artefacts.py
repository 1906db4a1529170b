"""What decoding adds that no picture has, by release and quality: patterns, bad borders, a colour cast, flat areas."""

import argparse
import math
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from coding.report import Row
from experiments.coded import Variant, baselines_of, curve_of, measured
from experiments.inputs import about, named_photographs, releases_of
from experiments.summary import write_summary
from measuring.artefacts import (
    GROUND,
    SMOOTH,
    Mesh,
    Weave,
    border_errors,
    fine_detail,
    lines,
    mesh,
    smooth_blocks,
    weave,
)
from measuring.metrics import colour_shift
from utils.distributed import is_main
from utils.images import read_image

FLAT = {"black": 0, "grey": 128, "white": 255}
SIDE = 256


def run(args: argparse.Namespace) -> None:
    """pictures.csv, and a row for the originals, for each release and quality, and for each codec of --beside.

    Raises:
        DiffoError: an option is wrong, before anything is coded; a picture cannot be read.
    """
    releases = releases_of(args, args.decoder)
    others = baselines_of(args.beside, releases, "--beside")
    variants = [v for name, codec in releases.items() for v in curve_of(name, codec, args)]
    means = measured(args, "pictures", releases, variants, others)
    if not is_main():
        return
    pictures = {name: read_image(path) for name, path in named_photographs(args.data, args.limit).items()}
    originals = torch.cat([smooth_blocks(picture)[0] for picture in pictures.values()])
    rows: list[Row] = [{"codec": "original", "smooth blocks": len(originals)} | detail_of(originals)]
    for mean in means:
        row = {key: mean[key] for key in ("codec", "label", "bytes")}
        if mean["bytes"] is not None:
            row |= found(pictures, args.out_path / "decoded" / mean["codec"] / mean["label"])
        rows.append(row)
    for variant, row in zip(variants, rows[1:], strict=False):
        if variant.bpp is None:  # a budget would give flat pictures the highest level
            row |= {f"{name}, largest error": flat(variant, value) for name, value in FLAT.items()}
    title = f"Artefacts, {args.data.name}"
    write_summary(rows, args.out_path, "artefacts", about(args, releases, meaning=MEANING), title)


MEANING = {
    "line": "power of the mean error spectrum at the multiple of 1/16 cycles per pixel that stands out most, over its neighbours'; pictures from 192 pixels",
    "colour line": "the same of red less blue",
    "mesh": "power of the line of the decoded pictures themselves, down and across, that gained most over what is around it, over the same of the originals",
    "colour mesh": "the same of red less blue",
    "smooth blocks": f"blocks of {GROUND}x{GROUND} pixels in which the original deviates by less than {SMOOTH:g} grey values",
    "weave": "RMS of what repeats every 16 pixels in the error of smooth blocks, grey values",
    "strongest line of it": "power of the error's spectrum there over what is around it",
    "fine detail": "RMS of smooth blocks without their moving mean over 16x16 pixels, grey values: grain in the original",
    "border / middle": "RMSE of the outer 4 pixels over that of the rest; some Kodak pictures end in a black line, which counts",
    "cast": "mean of decoded minus original, grey values",
    "largest error": f"of a flat picture of {SIDE}x{SIDE} pixels, grey values; not by --bpp",
}


def found(pictures: dict[str, torch.Tensor], folder: Path) -> Row:
    """Artefacts of a set as it was decoded into `folder`, a PNG for each of the pictures by name."""
    pairs = [(image, read_image(folder / f"{Path(name).with_suffix('')}.png")) for name, image in pictures.items()]
    row: Row = {}
    for kind, colour in (("line", False), ("colour line", True)):
        for axis, (frequency, ratio) in lines(pairs, colour).items():
            row |= {f"{kind} along {axis}": ratio, f"{kind} along {axis}, cycles per pixel": frequency}
        if (strongest := mesh(pairs, colour)) is not None:
            name = kind.replace("line", "mesh")
            row |= {name: strongest.ratio, f"{name}, cycles per pixel": where(strongest)}
    row |= on_smooth_ground(pairs)
    border, middle = (fmean(errors) for errors in zip(*(border_errors(*pair) for pair in pairs), strict=True))
    row["border / middle"] = math.sqrt(border / middle) if middle else None
    shifts = zip(*(colour_shift(*pair) for pair in pairs), strict=True)
    return row | {f"cast {channel}": fmean(shift) for channel, shift in zip("RGB", shifts, strict=True)}


def on_smooth_ground(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Row:
    """Weave and fine detail of (original, decoded); {} where no original has smooth ground."""
    original, decoded = (torch.cat(blocks) for blocks in zip(*(smooth_blocks(*pair) for pair in pairs), strict=True))
    if not len(original):
        return {}
    woven = weave(decoded - original)
    row: Row = {"smooth blocks": len(original), "weave": woven.rms, "strongest line of it": woven.ratio}
    return row | {"at cycles per pixel": where(woven)} | detail_of(decoded)


def where(pattern: Weave | Mesh) -> str:
    return f"{pattern.down:g} down, {pattern.across:g} across"


def detail_of(blocks: torch.Tensor) -> Row:
    return {"fine detail": fine_detail(blocks)} if len(blocks) else {}


def flat(variant: Variant, value: int) -> int:
    """The largest error of a picture of one grey value, coded and decoded."""
    picture = torch.full((3, SIDE, SIDE), value, dtype=torch.uint8)
    model = variant.model
    decoded = model.decode(variant.file(partial(model.analyse, picture)), variant.sampling)
    return (decoded.image.int() - value).abs().max().item()
