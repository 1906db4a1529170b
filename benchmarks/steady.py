"""Memory of a long run: thousands of small pictures through inference.py, and what is resident as they are done.

    python -m benchmarks.steady                       10,000 pictures of about 96x64
    python -m benchmarks.steady --count 400 --every 100 -- --mode compress

The pictures are the photographs that scikit-image ships, scaled down to three sizes, again and again. Resident memory is
the process's as Linux tells it, Python and PyTorch included; the rows of the table, some kilobytes each, grow with it.
"""

import argparse
import io
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from threading import Event, Thread
from typing import TextIO

from tqdm import tqdm

from coding import batch, options
from datapipe.sources import demo_photographs
from experiments.timing import fitted
from utils.commandline import answer, command_parser, positive
from utils.images import write_image

SIZES = "64x96", "72x96", "64x88"  # height, width
PAUSE = 0.2  # seconds between two looks


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--count", type=positive, default=10_000, metavar="N", help="pictures (default: 10000)")
    parser.add_argument("--every", type=positive, default=1000, metavar="N", help="told after so many (default: 1000)")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="of inference.py, after --: -- --quality 40")
    return parser.parse_args(argv)


def pictures(folder: Path, count: int) -> Path:
    """A folder of so many pictures, which are links to a few."""
    for number, path in enumerate(demo_photographs()):
        for size in SIZES:
            write_image(folder / f"{number}-{size}.png", fitted(path, size))
    some = sorted(folder.glob("*.png"))
    (folder / "in").mkdir()
    for number in range(count):
        os.link(some[number % len(some)], folder / "in" / f"{number:06}.png")
    return folder / "in"


def resident() -> float:
    """Resident memory of this process, in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def watch(out: Path, every: int, ended: Event, told: TextIO) -> None:
    """Tell what is resident whenever so many pictures more have been written, until the run has ended."""
    due = every
    while not ended.wait(PAUSE):
        done = sum(path.suffix == ".dfo" for path in out.iterdir()) if out.is_dir() else 0
        if done >= due:
            tqdm.write(f"{done:9,} pictures {resident():9.0f} MB", file=told)
            due = done // every * every + every


def bench(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder, ended = Path(temporary), Event()
        source, out = pictures(folder, args.count), folder / "out"
        asked = options.parse(["-i", str(source), "-o", str(out), *args.options])
        watching = Thread(target=watch, args=(out, args.every, ended, sys.stdout))
        watching.start()
        try:
            with redirect_stdout(io.StringIO()):  # a line for every picture
                status = batch.run(asked)
        finally:
            ended.set()
            watching.join()
        print(f"{'at the end':>18} {resident():9.0f} MB")
        return status


if __name__ == "__main__":
    sys.exit(answer(bench, parse()))
