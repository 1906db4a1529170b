"""The speeds that docs/speed.md states of CUDA, as many as two and a half minutes allow: cuda.csv, cuda.json, cuda.md.

    python -m benchmarks.cuda
    python -m benchmarks.cuda --parts parts whole -o results/cuda

Parts of the published sizes (random weights) and of the model that ships are timed as `reproduce.py timing` times them,
training as `python -m benchmarks.train` does. The most telling parts come first; each has a time limit of its own, and
what was measured until then counts. What is not reached is named.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.cuda_parts import TINY, Bench, Sizes
from coding.report import Row
from coding.table import write_json
from experiments.inputs import about
from experiments.summary import write_summary
from utils.commandline import answer, command_line, command_parser
from utils.distributed import local_device
from utils.errors import DiffoError
from utils.files import make_folder, require_writable

TOTAL = 150.0  # seconds

# By name: seconds at most, and the part; the most valuable first.
PARTS = {
    "parts": (45, Bench.parts),
    "whole": (20, Bench.whole),
    "training codec": (40, lambda bench: bench.training("codec", "defaults")),
    "training gt": (30, lambda bench: bench.training("gt", "defaults")),
    "batch": (10, Bench.batch),
    "agreement": (20, Bench.agreement),
    "modes": (30, Bench.modes),
    "networks": (15, Bench.networks),
    "training small": (45, Bench.small_training),
    "large": (15, Bench.large),
    "launches": (15, Bench.launches),
    "training codec, no graphs": (20, lambda bench: bench.training("codec", "without graphs")),
    "training codec, plain": (20, lambda bench: bench.training("codec", "plain")),
    "training gt, plain": (20, lambda bench: bench.training("gt", "plain")),
    "compiled": (70, Bench.compiled),
    "training codec, compiled": (120, lambda bench: bench.training("codec", "defaults+compile")),
}


class OutOfTime(BaseException):
    """A part has had its seconds. No error, which a fast path would take for its own and give up."""


@contextmanager
def limited(limit: float) -> Iterator[None]:
    """OutOfTime after so many seconds, between two calls into the device."""

    def end(*_) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("-o", "--out_path", type=Path, default=Path("results/cuda"), metavar="DIR")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cuda or cuda:N")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # the smallest networks, on any device
    args = parser.parse_args(argv)
    args.command = command_line("-m benchmarks.cuda", argv)
    return args


def run(args: argparse.Namespace) -> None:
    """Measure part by part; what there is stands in cuda.json after each.

    Raises:
        DiffoError: there is no CUDA here.
    """
    device = local_device(args.device)
    if device.type != "cuda" and not args.tiny:
        raise DiffoError(
            "this measures CUDA, which PyTorch does not find here: it needs a GPU (make bench for this CPU)"
        )
    require_writable(make_folder(args.out_path))
    args.device = str(device)
    told, rows, began = about(args, {}), [], time.perf_counter()
    bench = Bench(TINY if args.tiny else Sizes(), device)
    for name in args.parts:
        limit, part = PARTS[name]
        left = TOTAL - (time.perf_counter() - began)
        before = time.perf_counter()
        print(f"{name:<28}", end="", flush=True)
        note = measured_within(min(limit, left), part(bench), rows) if left > 1 else "not reached"
        took = time.perf_counter() - before
        told[name] = note or f"{took:.1f} s"
        print(told[name], flush=True)
        write_json({"about": told, "rows": rows}, args.out_path / "cuda.json")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if not rows:
        raise DiffoError("nothing could be measured; the reasons stand above")
    write_summary(rows, args.out_path, "cuda", told, "Speed on CUDA")


def measured_within(limit: float, part: Iterator[Row], rows: list[Row]) -> str | None:
    """Add what a part measures within so many seconds; why it gives no more, if it does not end."""
    try:
        with limited(limit):
            for row in part:
                rows.append(row)
    except OutOfTime:
        return f"ended after its {limit:.0f} s"
    except Exception as error:  # of one part: the others are still worth their time on a borrowed machine
        return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def main(argv: list[str] | None = None) -> int:
    return answer(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
