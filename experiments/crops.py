"""Crops at their own scale beside other codecs at equal bytes: one picture that shows what scores do not."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from coding.report import Row
from experiments.baselines import saved
from experiments.coded import COUNTED, Coding, Variant, at, baselines_of, curve_of, evaluator_of, table_of
from experiments.inputs import about, demo_folder, named_photographs, releases_of, spread
from experiments.summary import codec_label, write_summary
from measuring.scores import SCORES
from measuring.sheets import Band, Cell, sheet
from utils.distributed import is_main
from utils.errors import DiffoError
from utils.files import atomic_write
from utils.images import read_image, to_pillow, write_image

FEW = 3  # pictures that are shown where none are named


@dataclass(frozen=True)
class Crop:
    """A square of a picture: its name in the set, and the square's left and top pixel."""

    picture: str
    left: int
    top: int

    def of(self, picture: Tensor, side: int) -> Tensor:
        return picture[:, self.top : self.top + side, self.left : self.left + side]


def run(args: argparse.Namespace) -> None:
    """crops.png, crops.jpg for documents, and their rows; what is coded stands in rates.csv, as `rates` leaves it.

    Raises:
        DiffoError: an option is wrong, before anything is coded; a picture cannot be read.
    """
    if bool(args.data) == args.demo:
        raise DiffoError("name pictures with --data, or take the demo photographs with --demo")
    if args.demo:
        args = argparse.Namespace(**vars(args) | {"data": demo_folder(args.out_path / "photographs")})
    releases = releases_of(args, args.decoder)
    baselines, evaluator = baselines_of(args.codecs, releases), evaluator_of(args)
    pictures = named_photographs(args.data)
    crops = crops_of(args.crops, pictures, args.side)
    chosen = {crop.picture: pictures[crop.picture] for crop in crops}
    curves = [curve_of(name, codec, args) for name, codec in releases.items()]
    with table_of(args, "rates", releases) as table:
        coding = Coding(table, chosen, args.out_path, evaluator)
        coding.code([variant for curve in curves for variant in curve])
        coding.match(baselines, curves[0], by=args.by)
    if not is_main():
        return
    others = [baseline.name for baseline in baselines]
    shown = [(crop, variant) for crop in crops for variant in curves[0]]
    found = [rows_of(table, crop, variant, curves, others, args.by) for crop, variant in shown]
    bands = [band(coding, crop, rows, args.side) for (crop, _), rows in zip(shown, found, strict=True)]
    drawn = sheet(bands, notes(evaluator.names, args.by), args.side)
    told = about(args, releases, side=args.side, bytes=COUNTED[args.by])
    columns = ("codec", "label", "picture", "bytes", "payload_bytes", "bpp", "scale", "setting", *evaluator.names)
    rows = {tuple(row[k] for k in columns[:3]): {k: row.get(k) for k in columns} for each in found for row in each}
    write_summary(list(rows.values()), args.out_path, "crops", told, f"Crops of {args.data.name}")
    written(drawn, args.out_path)


def crops_of(asked: Sequence[tuple[str, int | None, int | None]], pictures: dict[str, Path], side: int) -> list[Crop]:
    """The squares that were asked for: (name or stem, left, top), in the middle where no place is named; the middles of
    some pictures where nothing was asked.

    Raises:
        DiffoError: no picture of that name, or the square is not inside it.
    """
    stems = {str(Path(name).with_suffix("")): name for name in pictures}
    crops = []
    for name, left, top in asked or [(name, None, None) for name in spread(list(pictures), FEW)]:
        if (known := stems.get(name, name)) not in pictures:
            raise DiffoError(f"--crops {name}: no such picture in --data")
        height, width = read_image(pictures[known]).shape[1:]
        if left is None:
            left, top = (width - side) // 2, (height - side) // 2
        if min(left, top) < 0 or left + side > width or top + side > height:
            place = f"{side}x{side} pixels from {left},{top}"
            raise DiffoError(f"--crops {name}: {place} are not inside its {width}x{height}; see --side")
        crops.append(Crop(known, left, top))
    return crops


def rows_of(
    table, crop: Crop, first: Variant, curves: Sequence[Sequence[Variant]], others: Sequence[str], by: str
) -> list[Row]:
    """What is shown of a crop at one quality of the first release: the releases that have it, then other codecs."""
    points = [(v.codec, v.label) for curve in curves for v in curve if v.label == first.label]
    points += [(name, at(first.label, by)) for name in others]
    return [table.get(*point, crop.picture) for point in points]


def band(coding: Coding, crop: Crop, rows: Sequence[Row], side: int) -> Band:
    """The original and what each row decodes to."""
    original = crop.of(read_image(coding.pictures[crop.picture]), side)
    cells = [Cell(original, ["original"])]
    for row in rows:
        label = codec_label(row["codec"])
        if row["bytes"] is None:
            cells.append(Cell(None, [label, "no file so small:", f"at least {row['floor_bytes']:,} bytes"]))
            continue
        decoded = read_image(coding.decoded(row["codec"], row["label"], crop.picture))
        lines = [label, f"{row['bytes']:,} bytes" + (f", scale {row['scale']:g}" if row["scale"] != 1 else "")]
        lines += [score_line(name, row[name]) for name in coding.evaluator.names if row.get(name) is not None]
        cells.append(Cell(crop.of(decoded, side), lines))
    name, first = Path(crop.picture).with_suffix(""), rows[0]
    return Band(f"{name}, from pixel {crop.left}, {crop.top}; {first['bpp']:.3f} bits per pixel", cells)


def score_line(name: str, value: float) -> str:
    score = SCORES[name]
    return f"{score.heading} {value:.{score.decimals}f} {score.unit}".strip()


def notes(names: Sequence[str], by: str) -> list[str]:
    """What the labels mean."""
    within = "without their containers " if by == "payload" else ""
    ways = [f"{SCORES[name].heading}: {'less' if SCORES[name].lower_is_better else 'more'} is better" for name in names]
    return [
        f"Pixel by pixel. The other codecs have their largest files {within}within the bytes of the first one's. Scale: "
        "share of the width and height that is coded; what is decoded is enlarged.",
        f"Bytes and scores are of whole pictures. {'; '.join(ways)}{'.' if ways else ''}",
    ]


def written(drawn: Tensor, folder: Path) -> None:
    """crops.png, and crops.jpg where that is smaller; says how large they are."""
    write_image(folder / "crops.png", drawn)
    size = (folder / "crops.png").stat().st_size
    jpeg = saved(to_pillow(drawn), "JPEG", quality=90, subsampling="4:4:4", optimize=True)
    told = f"wrote {folder / 'crops.png'}, {size / 1e6:.2f} MB"
    if len(jpeg) < size:
        atomic_write(folder / "crops.jpg", jpeg)
        told += f", and crops.jpg, {len(jpeg) / 1e6:.2f} MB, which is not exact"
    print(told)
