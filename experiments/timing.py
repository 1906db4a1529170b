"""Milliseconds and floating-point operations of every part of coding a picture, at fixed sizes.

Protocol: a picture is read, coded, written, read back, decoded with one step and written as PNG. After one round of
warm-up, medians and quartiles over --repeats; on CUDA every part waits for the device. Operations count a
multiplication and an addition as two, of matrix products and convolutions; the peak is that of a large matrix product
in the same precision, measured here.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from coding.report import Row
from coding.table import Table
from datapipe.sources import demo_photographs
from experiments.coded import at_quality, table_of
from experiments.inputs import about, checksum, photographs, releases_of, weights_of
from experiments.stopwatch import READ, REST, WRITE, Stopwatch, seconds
from experiments.summary import draw_bars, write_summary
from models.codec import Codec
from utils.distributed import is_main
from utils.files import atomic_write
from utils.images import read_image, write_image

KEY = ("codec", "size", "way", "part")
WAYS = ("encode", "decode")
TOTAL = "all parts together"
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product measures the peak
PEAK_REPEATS = 7

Counts = dict[str, dict[str, float]]  # way -> part -> what it took


def run(args: argparse.Namespace) -> None:
    """timing.csv: a row for every release, size, way and part; the main process alone measures.

    Raises:
        DiffoError: an option is wrong, before anything is timed.
    """
    releases = releases_of(args, args.decoder)
    for name, codec in releases.items():
        at_quality(name, codec, args.quality)
    picture = (photographs(args.data) if args.data else demo_photographs())[0]
    if not is_main():
        return
    found = {}
    with table_of(args, "rows", releases, KEY) as table:
        for name, codec in releases.items():
            for size in args.sizes:
                found[name, size] = timed(table, name, codec, picture, size, args)
    told = about(args, releases, precision=args.precision, quality=args.quality, repeats=args.repeats)
    rows = [
        {"part": row["part"]} | {k: v for k, v in row.items() if k != "made_from"} for row in chain(*found.values())
    ]
    write_summary(rows, args.out_path, "timing", told, "Time and operations of every part of coding a picture")
    for (name, size), parts in found.items():
        for way in WAYS:
            of_way = [row for row in parts if row["way"] == way]
            title = f"{name}, {size}: milliseconds to {way}"
            draw_bars(of_way, args.out_path, ["ms"], ["part"], title, f"{name}-{size}-{way}-")


def made_from(codec: Codec, picture: Path, args: argparse.Namespace) -> str:
    """All that times hang on, but for the machine."""
    made = f"{weights_of(codec)}, quality {args.quality:g}, {args.precision}, {args.repeats} repeats, "
    return made + f"{codec.device}, {torch.get_num_threads()} threads, picture {checksum(picture)}"


def timed(table: Table, name: str, codec: Codec, picture: Path, size: str, args: argparse.Namespace) -> list[Row]:
    """The rows of a release and size: those of the table, if they are of the same weights and setting."""
    made = made_from(codec, picture, args)
    done = [row for row in table.rows if (row["codec"], row["size"]) == (name, size) and row["made_from"] == made]
    if done:
        return done
    rows = [{"codec": name, "size": size, **row, "made_from": made} for row in measure(codec, picture, size, args)]
    for row in rows:
        table.add(row)
    return rows


def measure(codec: Codec, picture: Path, size: str, args: argparse.Namespace) -> list[Row]:
    """Rows of both ways: milliseconds (median, quartiles), share of their sum, GFLOP and share of the peak.

    Args:
        picture: cropped and scaled to `size`, HEIGHTxWIDTH. args: quality, precision and repeats.
    """
    device, level = codec.device, codec.level_code(args.quality)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16")
    with tempfile.TemporaryDirectory() as folder, autocast:
        source = Path(folder) / "source.png"
        write_image(source, fitted(picture, size))
        once = partial(code, codec, source, level)
        rounds = [once(partial(seconds, device)) for _ in tqdm(range(args.repeats + 1), desc=size, leave=False)][1:]
        with FlopCounterMode(display=False) as counter:
            flops = once(counter.get_total_flops)
    peak = matrix_peak(device, args.precision)
    return [row for way in WAYS for row in rows_of(way, [each[way] for each in rounds], flops[way], peak)]


def fitted(picture: Path, size: str) -> torch.Tensor:
    """A picture cropped and scaled to HEIGHTxWIDTH: uint8 (3, H, W)."""
    height, width = map(int, size.split("x"))
    image = ImageOps.fit(Image.fromarray(read_image(picture).permute(1, 2, 0).numpy()), (width, height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def code(codec: Codec, source: Path, level: int, clock: Callable[[], float]) -> Counts:
    """What the parts of one picture's way there, and back, take by a clock."""
    stopwatch, found = Stopwatch(clock), {}
    stream = source.with_suffix(".dfo")

    def encode() -> None:
        image = stopwatch.count(READ, read_image, source)
        data = codec.write(codec.analyse(image), level)
        stopwatch.count(WRITE, atomic_write, stream, data)

    def decode() -> None:
        decoded = codec.decode(stopwatch.count(READ, stream.read_bytes))
        stopwatch.count(WRITE, write_image, source.with_name("decoded.png"), decoded.image)

    with stopwatch.watching(codec):
        for way, work in zip(WAYS, (encode, decode), strict=True):
            stopwatch.spent.clear()
            stopwatch.count(REST, work)
            found[way] = dict(stopwatch.spent)
    return found


def rows_of(way: str, rounds: list[dict[str, float]], flops: dict[str, float], peak: float) -> list[Row]:
    """A row for every part of one way, in the order of their first calls, and one for all together.

    Args:
        rounds: seconds by part of every repeat. peak: operations a second.
    """
    parts = sorted(dict.fromkeys(part for each in rounds for part in each), key=lambda part: part == REST)
    times = {part: [each.get(part, 0.0) for each in rounds] for part in parts}
    times[TOTAL] = [sum(each.values()) for each in rounds]
    flops = flops | {TOTAL: sum(flops.values())}
    whole = float(np.median(times[TOTAL]))
    rows = []
    for part, values in times.items():
        low, median, high = map(float, np.percentile(values, (25, 50, 75)))
        row = {"way": way, "part": part, "ms": 1e3 * median, "first quartile": 1e3 * low, "third quartile": 1e3 * high}
        row |= {"share of the way, %": 100 * median / whole, "GFLOP": flops.get(part, 0) / 1e9}
        rows.append(row | {"share of the peak, %": 100 * flops.get(part, 0) / (peak * median) if median else None})
    return rows


def matrix_peak(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product, the fastest of some."""
    side = PEAK_SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=getattr(torch, precision))
    times = []
    for _ in range(PEAK_REPEATS + 1):
        began = seconds(device)
        matrix @ matrix
        times.append(seconds(device) - began)
    return 2 * side**3 / min(times[1:])
