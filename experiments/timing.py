"""Milliseconds and floating-point operations of every part of coding a picture, at fixed sizes.

Protocol: a picture is read, coded, written, read back, decoded with one step and written as PNG. After one round of
warm-up, medians and quartiles over --repeats; on CUDA every part waits for the device. Each is followed by one of
the same networks in plain float32, without fast paths and with the allocator left to itself, so that what else the
machine does hits both alike. Operations count a multiplication and an addition as two, of matrix products and
convolutions as they are computed; the peak is the faster of a large matrix product and a 3x3 convolution of 256 channels,
measured here in the precision of the networks.
"""

import argparse
import copy
import json
import math
import tempfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from coding.report import Row
from coding.table import Table
from datapipe.sources import demo_photographs
from experiments.coded import at_quality, table_of
from experiments.inputs import about, checksum, photographs, releases_of, weights_of
from experiments.published import OURS, published
from experiments.stopwatch import READ, REST, WRITE, Stopwatch, seconds
from experiments.summary import KIND, PAPER, draw_bars, origin, write_summary
from measuring.metrics import psnr
from models.codec import Codec
from models.records import CodecParams
from models.speed.fast import precision_of, prepare, without_fast_paths
from models.speed.graphs import leave_graphs
from utils.config import build, load_mapping, to_mapping
from utils.distributed import is_main, local_device
from utils.errors import DiffoError
from utils.files import atomic_write
from utils.images import read_image, to_pillow, to_tensor, write_image
from utils.memory import keep_freed_memory

KEY = ("codec", "size", "way", "part")
WAYS = ("encode", "decode")
TOTAL = "all parts together"
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product measures the peak; maps have an eighth
PEAK_CHANNELS = 256
PEAK_REPEATS = 7

Counts = dict[str, dict[str, float]]  # way -> part -> what it took


def run(args: argparse.Namespace) -> None:
    """timing.csv: a row for every release, size, way and part; the main process alone measures.

    Raises:
        DiffoError: an option is wrong, before anything is timed.
    """
    if args.config and (args.weights or args.decoder != ["full"]):
        raise DiffoError("--config times random weights, with D: leave out --weights and --decoder")
    releases = untrained(args) if args.config else releases_of(args, args.decoder)
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
    told["without"] = " ".join(args.without) or None
    rows = [as_shown(row) for row in chain(*found.values())]
    told["paper"] = origin("paper-table1") if any(KIND in row for row in rows) else None
    write_summary(rows, args.out_path, "timing", told, "Time and operations of every part of coding a picture")
    for (name, size), parts in found.items():
        for way in WAYS:
            of_way = [row for row in parts if row["way"] == way]
            title = f"{name}, {size}: milliseconds to {way}"
            draw_bars(of_way, args.out_path, ["ms"], ["part"], title, f"{name}-{size}-{way}-")


def as_shown(row: Row) -> Row:
    """A row as it is shown: the part first, and the paper's milliseconds, which it has of both ways at 768x768."""
    columns = dict.fromkeys(("part", "codec", "size", "way", "ms", PAPER + "ms"))
    shown = columns | {key: value for key, value in row.items() if key != "made_from"}
    (paper,) = (record for record in published(source="paper-table1") if record.system == OURS)
    if (row["part"], row["size"]) == (TOTAL, paper.size):
        shown |= {PAPER + "ms": 1e3 * getattr(paper, f"{row['way']}_s"), KIND: paper.kind}
    return shown


def untrained(args: argparse.Namespace) -> dict[str, Codec]:
    """A codec of a configuration's sizes by its name: random weights in every layer, indices at fixed length.

    Raises:
        ConfigError: no such file, or a wrong one.
    """
    config = load_mapping(args.config)
    params = build(CodecParams, config.get("networks", {}), f"{args.config}: networks")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = Codec(params)
        for module in codec.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):  # those that training starts at zero, too
                module.reset_parameters()
    if codec.residual:
        codec.residual.freeze(None)
    codec.fingerprint = zlib.crc32(json.dumps(to_mapping(params), sort_keys=True).encode()).to_bytes(4, "big")
    name = f"{config.get('name', args.config.stem)}, random weights"
    return {name: codec.eval().requires_grad_(False).to(local_device(args.device))}


def made_from(codec: Codec, picture: Path, args: argparse.Namespace) -> str:
    """All that times hang on, but for the machine."""
    made = f"{weights_of(codec)}, quality {args.quality:g}, {args.precision}, {args.repeats} repeats, "
    made += f"without {' '.join(sorted(args.without))}, " if args.without else ""
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
    """Rows of both ways: milliseconds (median, quartiles), how many times faster than plain float32, GFLOP and shares.

    Args:
        codec: as it was loaded. picture: cropped and scaled to `size`, HEIGHTxWIDTH.
        args: quality, precision, fast paths to leave out (without) and repeats.
    """
    device, level = codec.device, codec.level_code(args.quality)
    fast = prepare(copy.deepcopy(codec), args.precision, args.without)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.png"
        write_image(source, fitted(picture, size))
        once = partial(code, source=source, level=level, clock=partial(seconds, device))
        keep = device.type == "cpu" and "keep_memory" not in args.without
        repeats = tqdm(range(args.repeats), desc=size, leave=False)
        rounds = turns(lambda: once(fast), lambda: once(codec), keep, repeats)
        leave_graphs(fast)  # what is replayed is not seen, and so not counted
        with FlopCounterMode(display=False) as counter:
            flops = code(fast, source, level, counter.get_total_flops)
        data = source.with_suffix(".dfo").read_bytes()
    precision = precision_of(fast)
    peak, rows = highest_rate(device, getattr(torch, precision)), []
    for way in WAYS:
        of_way, plain = ([each[way] for each in found] for found in rounds)
        rows += rows_of(way, of_way, plain, flops[way], peak)
    apart = psnr(codec.decode(data).image, fast.decode(data).image)
    rows[-1] |= {"precision": precision, "PSNR to float32, dB": apart if math.isfinite(apart) else None}
    return rows


def fitted(picture: Path, size: str) -> torch.Tensor:
    """A picture cropped and scaled to HEIGHTxWIDTH: uint8 (3, H, W)."""
    height, width = map(int, size.split("x"))
    return to_tensor(ImageOps.fit(to_pillow(read_image(picture)), (width, height)))


def turns(
    fast: Callable[[], Counts], plain: Callable[[], Counts], keep: bool, repeats: Iterable
) -> tuple[list[Counts], list[Counts]]:
    """What either gives in rounds of both; freed memory stays with the process for the fast one, if it is to `keep` it.

    The allocator is the plain one's before anything is kept: what networks keep for good would else lie above the memory
    that is given back for it. So is the fast one's first pass of a round, in which memory comes again, not counted.
    """
    found: tuple[list[Counts], list[Counts]] = [], []
    fast(), plain()
    for _ in repeats:
        keep_freed_memory(keep)
        fast()
        found[0].append(fast())
        keep_freed_memory(False)
        with without_fast_paths():
            found[1].append(plain())
    return found


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


def rows_of(
    way: str, rounds: list[dict[str, float]], plain: list[dict[str, float]], flops: dict[str, float], peak: float
) -> list[Row]:
    """A row for every part of one way, in the order of their first calls, and one for all together.

    Args:
        rounds, plain: seconds by part of every repeat, and of the plain one that followed it.
        flops: by part. peak: operations a second.
    """
    parts = sorted(dict.fromkeys(part for each in rounds for part in each), key=lambda part: part == REST)
    times, plain_times = (
        {part: [each.get(part, 0.0) for each in found] for part in parts} for found in (rounds, plain)
    )
    times[TOTAL], plain_times[TOTAL] = ([sum(each.values()) for each in found] for found in (rounds, plain))
    flops = flops | {TOTAL: sum(flops.values())}
    whole = float(np.median(times[TOTAL]))
    rows = []
    for part, values in times.items():
        low, median, high = map(float, np.percentile(values, (25, 50, 75)))
        row = {"way": way, "part": part, "ms": 1e3 * median, "first quartile": 1e3 * low, "third quartile": 1e3 * high}
        slower = float(np.median(plain_times[part]))
        ratios = [b / a for a, b in zip(values, plain_times[part], strict=True) if a]
        row |= {"plain float32, ms": 1e3 * slower, "times as fast": float(np.median(ratios)) if ratios else None}
        row |= {"share of the way, %": 100 * median / whole, "GFLOP": flops.get(part, 0) / 1e9}
        rows.append(row | {"share of the peak, %": 100 * flops.get(part, 0) / (peak * median) if median else None})
    return rows


def highest_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product or of a 3x3 convolution of NHWC maps, whichever is faster."""
    side, channels = PEAK_SIDE[device.type], PEAK_CHANNELS
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    maps, kernels = (
        torch.randn(n, channels, w, w, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        for n, w in ((1, side // 8), (channels, 3))
    )
    convolution = 2 * 9 * channels * maps.numel() / shortest(lambda: F.conv2d(maps, kernels, padding=1), device)
    return max(2 * side**3 / shortest(lambda: matrix @ matrix, device), convolution)


def shortest(work: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(PEAK_REPEATS + 1):
        began = seconds(device)
        work()
        times.append(seconds(device) - began)
    return min(times[1:])
