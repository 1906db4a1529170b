"""A folder of pictures, coded and decoded one after the other, and as `inference.py` does it: pictures per second.

    python -m benchmarks.folder                       200 pictures of 512x512
    python -m benchmarks.folder --count 12 --rounds 1

The pictures are crops of the photographs that scikit-image ships. Both ways write the same files, PNGs and scores, with
networks that are loaded. They take turns, a part of the pictures each, so that what else the machine does slows both.
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import torch
from tqdm import tqdm

from coding import options
from coding.plan import Job
from coding.run import Result, Run
from datapipe.sources import demo_photographs
from utils.commandline import answer, command_parser, positive
from utils.errors import DiffoError
from utils.images import from_pillow, read_image, to_pillow, write_image

WAYS = {"one after the other": ["--batch", "1"], "as inference.py does it": []}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--count", type=positive, default=200, metavar="N", help="pictures (default: 200)")
    parser.add_argument("--side", type=positive, default=512, metavar="PX", help="of each, in pixels (default: 512)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="parts of them, in turn (default: 5)")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="of inference.py, after --: -- --quality 40")
    return parser.parse_args(argv)


def crops(folder: Path, count: int, side: int) -> list[Path]:
    """So many square crops of the demo photographs, from other places each, as PNG files."""
    photographs = [read_image(path) for path in demo_photographs()]
    paths = []
    for number, picture in enumerate(islice(cycle(photographs), count)):
        image = to_pillow(picture)
        scale = max(1, side / min(image.size))
        image = image.resize([round(scale * length) for length in image.size])
        left, top = ((97 * number) % (length - side + 1) for length in image.size)
        crop = from_pillow(image.crop((left, top, left + side, top + side)), "crop")
        paths.append(folder / f"{number:04}.png")
        write_image(paths[-1], crop)
    return paths


def seconds(work: Run, paths: list[Path], out: Path) -> float:
    """What coding and decoding them takes. Raises DiffoError for the first that fails."""

    def take(result: Result) -> None:
        if result.error:
            raise DiffoError(result.error)

    began = time.perf_counter()
    work.each([Job(path, path.name, out / path.stem) for path in paths], take, lambda: False)
    return time.perf_counter() - began


def bench(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = crops(folder, args.count, args.side)
        parts = [part for i in range(args.rounds) if (part := paths[i :: args.rounds])]
        ways, rates = {}, {way: [] for way in WAYS}
        for number, (way, flags) in enumerate(WAYS.items()):
            asked = options.parse(["-i", temporary, "-o", temporary, *flags, *args.options])
            ways[way] = Run(asked, folder / str(number))
            seconds(ways[way], paths[:2], folder / str(number))  # warms up
        for part in tqdm(parts, leave=False):
            for number, way in enumerate(WAYS):
                rates[way].append(len(part) / seconds(ways[way], part, folder / str(number)))
    print(f"{args.count} pictures of {args.side}x{args.side}, {torch.get_num_threads()} threads; medians")
    first, second = rates.values()
    for way, found in rates.items():
        print(f"{way:26}{statistics.median(found):8.2f} pictures/s")
    print(f"{'ratio':26}{statistics.median(b / a for a, b in zip(first, second, strict=True)):8.2f}")


if __name__ == "__main__":
    sys.exit(answer(bench, parse()))
