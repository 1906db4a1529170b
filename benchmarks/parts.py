"""Milliseconds for each part of coding a picture: file I/O, networks, entropy coding.

    python -m benchmarks.parts --pictures kodak --quality 40

Every picture is read, coded, written, read back, decoded and written as PNG, `--rounds` times after one round of warm-up,
with one step. Printed are medians over pictures and rounds, and shares of the total. On CUDA every part waits for the
device.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn
from tqdm import tqdm

from coding.options import quality
from datapipe.sources import demo_photographs
from experiments.inputs import photographs
from models import entropy_coding
from models.codec import Codec
from models.released import SMALL, load_release
from utils.commandline import answer, command_parser, positive
from utils.distributed import local_device
from utils.files import atomic_write
from utils.images import read_image, write_image

# (owner, its attribute, name of the part)
NETWORKS = (
    ("autoencoder", "encode", "E"),
    ("vq_base", "indices", "VQ-E, nearest codes"),
    ("vq_base", "reconstruct", "VQ-D"),
    ("residual", "analysis", "g_a"),
    ("residual", "symbols", "h_a"),
    ("residual", "table_index", "h_s, exact integers"),
    ("residual", "_mean", "m_s"),
    ("residual", "restore", "g_s"),
    ("", "denoise", "U, with its noise"),
    ("autoencoder", "decode", "D"),
)
PASSES = [("index_model", name, "indices in passes") for name in ("encode", "decode")]  # where the weights have it
REST = "the rest"
CODER = ("encode_indices", "encode_symbols", "decode_indices", "decode_symbols")


class Stopwatch:
    """Times calls by name. A call inside another counts for its own part alone."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside = [0.0]  # of the calls that are under way: seconds of the parts within

    def time(self, part: str, work: Callable, *args, **kwargs):
        self.inside.append(0.0)
        began = self._now()
        result = work(*args, **kwargs)
        spent = self._now() - began
        self.seconds[part] += spent - self.inside.pop()
        self.inside[-1] += spent
        return result

    def watch(self, owner: object, attribute: str, part: str) -> None:
        """Time every call of an attribute of an object from now on."""
        if isinstance(getattr(owner, attribute), nn.Module):
            owner, attribute = getattr(owner, attribute), "forward"
        work = getattr(owner, attribute)
        vars(owner)[attribute] = lambda *args, **kwargs: self.time(part, work, *args, **kwargs)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def code(codec: Codec, stopwatch: Stopwatch, path: Path, folder: Path, level: int) -> list[dict[str, float]]:
    """Seconds by part of one picture's way there, and back."""
    stream, found = folder / "a.dfo", []

    def there() -> None:
        image = stopwatch.time("read the picture", read_image, path)
        data = codec.write(codec.analyse(image), level)
        stopwatch.time("write the file", atomic_write, stream, data)

    def back() -> None:
        decoded = codec.decode(stopwatch.time("read the file", stream.read_bytes))
        stopwatch.time("write the PNG", write_image, folder / "a.png", decoded.image)

    for work in (there, back):
        stopwatch.seconds.clear()
        stopwatch.time(REST, work)
        found.append(dict(stopwatch.seconds))
    return found


def table(name: str, runs: list[dict[str, float]]) -> str:
    """Medians of the parts, and of their sums, in milliseconds."""
    total = median(sum(run.values()) for run in runs)
    parts = sorted(dict.fromkeys(part for run in runs for part in run), key=lambda part: part == REST)
    medians = {part: median(run.get(part, 0.0) for run in runs) for part in parts} | {"together": total}
    lines = [f"  {part:22}{1e3 * seconds:9.2f}{seconds / total:8.1%}" for part, seconds in medians.items()]
    return "\n".join([f"{name:24}{'ms':>9}{'share':>8}", *lines])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--weights", type=Path, default=SMALL, metavar="DIR", help="release folder (default: the small one that ships)")
    add("--pictures", type=Path, metavar="DIR", help="pictures (default: those of scikit-image)")
    add("--quality", type=quality, default=40.0, metavar="Q", help="0, the base alone, to 100 (default: 40)")
    add("--rounds", type=positive, default=3, metavar="N", help="rounds over all pictures (default: 3)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of the networks")
    return parser.parse_args(argv)


def bench(args: argparse.Namespace) -> None:
    device = local_device(args.device)
    paths = photographs(args.pictures) if args.pictures else demo_photographs()
    codec = load_release(args.weights, device)
    level, stopwatch = codec.level_code(args.quality), Stopwatch(device)
    for owner, attribute, part in (*NETWORKS, *PASSES):
        if (network := getattr(codec, owner) if owner else codec) is not None:
            stopwatch.watch(network, attribute, part)
    for name in CODER:
        stopwatch.watch(entropy_coding, name, "range coder")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16")
    with tempfile.TemporaryDirectory() as folder, autocast:
        order = tqdm([paths[0], *paths * args.rounds], unit="picture", leave=False)  # the first warms up
        runs = [code(codec, stopwatch, path, Path(folder), level) for path in order]
    encoded, decoded = zip(*runs[1:], strict=True)
    print(
        f"{args.weights.name}, quality {args.quality:g}, {len(paths)} pictures, {args.rounds} rounds, {device}, "
        f"{args.precision}, {torch.get_num_threads()} threads: medians"
    )
    print(table("encode", encoded), table("decode", decoded), sep="\n")


if __name__ == "__main__":
    sys.exit(answer(bench, parse()))
