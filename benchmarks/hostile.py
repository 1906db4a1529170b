"""Hostile files: what the decoder does with altered ones, and what that costs.

python -m benchmarks.hostile --weights weights/tiny-2 --pictures photos/

Two sets, both seeded. Of the first, 10,000 mutations of valid files, every one must be refused with BitstreamError. The
second, 1,000, has its checksums recomputed, and a quarter of it are random symbols written as the encoder would: a file
may decode to nonsense or be refused with an error of the project.
Refusals must stay under 1 s of processor time and 200 MB beyond the model, decoding under what a picture of the size
that the file states may take. Prints counts, times and memory; the exit status is 1 after any violation.
"""

import argparse
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from benchmarks import mutations
from datapipe.sources import demo_photographs
from experiments.inputs import photographs
from models.bitstream import CodedResidual, pack, unpack
from models.codec import Codec
from models.entropy_coding import encode_indices, encode_symbols
from models.released import SMALL, load_codec
from models.residual_networks import hyper_size
from utils.commandline import answer, positive
from utils.errors import BitstreamError, DiffoError
from utils.images import read_image

SECONDS, MEGABYTES = 1.0, 200
SLOWER = 5  # times the processor time per pixel of the valid files: what nonsense may take
QUALITIES = (0, 1, 20, 60, 100)
REFUSED = BitstreamError.__name__
ERRORS = {error.__name__ for error in DiffoError.__subclasses__()}


@dataclass
class Set:
    """The outcomes of one set of files.

    Attributes:
        outcomes: how many files had each. slowest: seconds of processor time to each, at most.
        violations: a line for each file that did what none may.
        largest: (height, width) of the largest picture that was decoded.
    """

    outcomes: Counter = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    largest: tuple[int, int] = (0, 0)

    def add(self, name: str, outcome: str, seconds: float, allowed: bool, limit: float = SECONDS) -> None:
        self.outcomes[outcome] += 1
        self.slowest[outcome] = max(seconds, self.slowest.get(outcome, 0.0))
        if not allowed or seconds > limit:
            self.violations.append(f"{name}: {outcome} after {seconds:.2f} s of {limit:.2f} s")

    def close(self, name: str, beyond: float, limit: float) -> None:
        """Print counts, times and memory beyond the model, in megabytes."""
        if beyond > limit:
            self.violations.append(f"{name} files: {beyond:.0f} MB beyond the model, more than {limit:.0f}")
        for outcome, count in sorted(self.outcomes.items()):
            print(f"{name:10} {outcome:28} {count:7,d}   slowest {self.slowest[outcome]:7.3f} s")
        print(f"{name:10} {'memory beyond the model':28} {beyond:7.0f} MB")


def valid_files(codec: Codec, pictures: Iterable[torch.Tensor]) -> list[bytes]:
    """Each picture, uint8 (3, H, W), at several qualities where the weights have levels."""
    qualities = QUALITIES if codec.has_levels else QUALITIES[:1]
    return [codec.compress(picture, quality) for picture in pictures for quality in qualities]


def read_altered(codec: Codec, files: list[bytes], count: int, seed: int = 0) -> Set:
    """The first set: nothing but BitstreamError will do; a preview shows a base that is whole, or nothing."""
    found = Set()
    whole = {unpack(data, preview=True) for data in files}
    for number, data in enumerate(mutations.altered(files, count, seed)):
        name = f"altered file {number}"
        outcome, seconds, _ = attempt(lambda data=data: codec.read(data))
        found.add(name, outcome, seconds, outcome == REFUSED)
        outcome, seconds, contents = attempt(lambda data=data: codec.read(data, preview=True))
        found.add(name, f"preview: {outcome}", seconds, outcome == REFUSED or contents and contents.file in whole)
    return found


def nonsense(codec: Codec, files: list[bytes], random: np.random.Generator) -> bytes:
    """A file of random symbols, each as likely as any other that the tables can code, up to the largest."""
    file = unpack(files[random.integers(len(files))])
    h, w = file.latent_size
    k = random.integers(0, codec.params.vq_base.codebook_size, h * w)
    base, fixed = encode_indices(k, codec.params.vq_base.codebook_size, codec.base_table)
    file = replace(file, base=base, fixed_length=fixed)
    if file.residual is None:
        return pack(file)
    residual, level = codec.residual, int(random.integers(1, 256))
    shape = (codec.params.residual.hyper_channels, *hyper_size(h, w))
    n_z, hyper = _random_symbols(*residual.hyper_coding(shape, level), random)
    index = residual.table_index(n_z.reshape(shape), torch.from_numpy(k).view(1, h, w))
    _, symbols = _random_symbols(*residual.residual_coding(index), random)
    return pack(replace(file, residual=CodedResidual(level, hyper, symbols)))


def _random_symbols(groups: np.ndarray, tables: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, bytes]:
    reach = (np.count_nonzero(tables, axis=1) // 2)[groups]
    symbols = random.integers(-reach, reach + 1)
    return symbols, encode_symbols(symbols, groups, tables)


def decode_resealed(codec: Codec, files: list[bytes], count: int, seed: int = 0) -> Set:
    """The second set, a quarter of it nonsense: any error of the project, or a picture of the size that was stated."""
    found = Set()
    codec.decompress(files[0])  # the first call is slower
    _, seconds, image = attempt(lambda: codec.decompress(files[0]))
    pace = SLOWER * seconds / image[0].numel()
    drawn = (nonsense(codec, files, np.random.default_rng([seed, number])) for number in range(count // 4))
    for number, data in enumerate(chain(drawn, mutations.resealed(files, count - count // 4, seed))):
        name, limit, size = f"resealed file {number}", SECONDS, None
        outcome, seconds, contents = attempt(lambda data=data: codec.read(data))
        if contents:
            size = contents.file.height, contents.file.width
            found.largest = max(found.largest, size, key=math.prod)
            limit += pace * math.prod(size)
            outcome, seconds, image = attempt(lambda data=data: codec.decompress(data))
        allowed = outcome in ERRORS or (outcome == "decoded" and image.shape == (3, *size))
        found.add(name, outcome, seconds, allowed, limit)
    return found


def attempt(work):
    """(outcome, seconds of processor time, result or None); the outcome is `decoded` or the name of the error's class."""
    began = time.process_time()
    try:
        result = work()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in another language is no Exception
        public = next(kind.__name__ for kind in type(error).__mro__ if not kind.__name__.startswith("_"))
        return public, time.process_time() - began, None
    return "decoded", time.process_time() - began, result


class Memory:
    """The most that this process takes from now on beyond what it has, in megabytes."""

    def __init__(self):
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far; elsewhere it stays
        self.before = self._peak()

    def beyond(self) -> float:
        return self._peak() - self.before

    def _peak(self) -> float:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def middle(picture: torch.Tensor, side: int) -> torch.Tensor:
    """The middle of a picture, at most side x side."""
    top, left = ((size - side) // 2 if size > side else 0 for size in picture.shape[1:])
    return picture[:, top : top + side, left : left + side]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", type=Path, default=SMALL, metavar="DIR", help="release folder (default: the small one that ships)")
    add("--pictures", type=Path, metavar="DIR", help="pictures (default: demo photographs)")
    add("--side", type=positive, default=256, metavar="PX", help="code the middle of each, this large (default 256)")
    add("--mutations", type=positive, default=10_000, metavar="N", help="size of the first set (default 10000)")
    add("--resealed", type=positive, default=1000, metavar="N", help="size of the second set (default 1000)")
    add("--seed", type=int, default=0, metavar="N", help="of both sets (default 0)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # threads that wait for each other would count as processor time
    codec = load_codec(args.weights)
    paths = photographs(args.pictures) if args.pictures else demo_photographs()
    files = valid_files(codec, (middle(read_image(path), args.side) for path in paths))
    print(f"{len(files)} valid files of {len(paths)} pictures, {min(map(len, files))} to {max(map(len, files))} bytes")
    codec.decompress(files[0])  # what libraries allocate once
    memory = Memory()
    altered = read_altered(codec, files, args.mutations, args.seed)
    altered.close("altered", memory.beyond(), MEGABYTES)
    sealed = decode_resealed(codec, files, args.resealed, args.seed)
    sealed.close("resealed", memory.beyond(), MEGABYTES + codec.memory(*sealed.largest) / 1e6)
    violations = altered.violations + sealed.violations
    print("\n".join(violations[:20] + [f"{len(violations)} violations"]))
    return 1 if violations else 0


def main(argv: list[str] | None = None) -> int:
    return answer(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
