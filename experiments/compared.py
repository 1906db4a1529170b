"""Pictures of `rates` for the report: every codec's files nearest to a few rates, as what a browser shows of them."""

from collections.abc import Sequence
from dataclasses import replace
from math import log
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from coding.report import Row
from experiments.baselines import BASELINES
from experiments.embedding import TYPES, Embedded, as_it_is, close_to
from experiments.inputs import checksum, named_photographs, spread
from measuring.scores import SCORES
from utils.errors import DiffoError
from utils.images import read_image

RATES = 3  # at which a picture is shown


def compared(folder: Path, rows: Sequence[Row], means: Sequence[Row], data: Path, limit: int) -> dict:
    """The pictures as plain data: the mean bpp of the first codec, a release, at some of its labels, and by picture
    what `_compared` returns.

    Args:
        folder: where `rates` left `files` and `decoded`. rows, means: its tables. data: the originals. limit: at most
            so many pictures, evenly spread.
    Raises:
        DiffoError: an original is not there, or not what was coded. PictureError: a picture cannot be read.
    """
    points = {(mean["codec"], mean["label"]) for mean in means}
    by_picture: dict[str, list[Row]] = {}
    for row in rows:
        if (row["codec"], row["label"]) in points:  # others are of earlier runs
            by_picture.setdefault(row["picture"], []).append(row)
    names = sorted(name for name, found in by_picture.items() if len(found) == len(points))
    names = spread(names, limit)
    first = means[0]["codec"]
    aims = spread(sorted((mean for mean in means if mean["codec"] == first), key=lambda mean: mean["bpp"]), RATES)
    labels = [mean["label"] for mean in aims]
    paths = named_photographs(data)
    originals = {name: _original(name, paths.get(name), by_picture[name][0]["made_from"]) for name in names}
    told = tqdm(originals.items(), "embedding", unit="picture")
    pictures = [_compared(folder, original, first, labels, by_picture[name]) for name, original in told]
    return {"rates": [mean["bpp"] for mean in aims], "first": first, "pictures": pictures}


def _compared(folder: Path, original: Tensor, first: str, labels: Sequence[str], rows: Sequence[Row]) -> dict:
    """One picture: its original, the `files` that are shown, and for every codec the positions there of the nearest to
    those that the first codec took at the labels; none for a codec that has no file of it."""
    aims = [next(row["bytes"] for row in rows if (row["codec"], row["label"]) == (first, label)) for label in labels]
    files: list[Row] = []
    nearest: dict[str, list[int]] = {}
    for codec in dict.fromkeys(row["codec"] for row in rows):
        if reached := [row for row in rows if row["codec"] == codec and row["bytes"] is not None]:
            chosen = [min(reached, key=lambda row: abs(log(row["bytes"] / aim))) for aim in aims]
            once = [row for row in reached if row in chosen]
            nearest[codec] = [len(files) + once.index(row) for row in chosen]
            files += once
    told = {name: rows[0][name] for name in ("picture", "width", "height")}
    shown = [_file(row) | vars(_embedded(folder, row)) for row in files]
    return told | {
        "original": vars(close_to(original)),
        "aims": aims,
        "files": shown,
        "nearest": nearest,
    }


def _file(row: Row) -> dict:
    """What the page says of a coded file."""
    told = {name: row[name] for name in ("codec", "label", "setting", "bytes", "bpp")}
    return told | {"scores": {name: row[name] for name in SCORES if row.get(name) is not None}}


def _original(name: str, path: Path | None, made_from: str) -> Tensor:
    """The original of which a row says that it was made from it, uint8 (3, H, W); errors as `compared`."""
    if path is None:
        raise DiffoError(f"{name}: not in --data, which should be the folder of the pictures that were coded")
    if not made_from.endswith(checksum(path)):
        raise DiffoError(f"{path}: not the picture of this name that was coded (--data)")
    return read_image(path)


def _embedded(folder: Path, row: Row) -> Embedded:
    """The coded file where browsers decode it, else what it decodes to; of half size where that was coded."""
    stem = Path(row["codec"], row["label"], row["picture"]).with_suffix("")
    halved = row["codec"] in BASELINES and row["scale"] != 1
    by = ", enlarged here from half size by Lanczos as it was measured" if halved else ""
    small = None
    if baseline := BASELINES.get(row["codec"]):
        data = folder.joinpath("files", f"{stem}{baseline.suffix}").read_bytes()
        if baseline.suffix in TYPES:
            coded = as_it_is(data, baseline.suffix, halved)
            return replace(coded, told=coded.told + by)
        small = baseline.opened(data) if halved else None
    decoded = close_to(read_image(folder / "decoded" / f"{stem}.png"), small)
    return replace(decoded, told=f"what it decodes to{by}, as {decoded.told}")
