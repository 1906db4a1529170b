"""Hostile files: what the decoder does with altered ones, and what that costs.

python -m benchmarks.hostile --weights weights/small --pictures photos/

Two sets, both seeded. Of the first, 10,000 mutations of valid files, every one must be refused with BitstreamError. The
second, 1,000, has checksums that match: layers with any bytes changed, other sizes, levels and sections, and random
symbols written as the encoder would; a file may decode to nonsense or be refused with an error of the project.
Refusals must stay under 1 s of processor time and 200 MB beyond the model, decoding under what a picture of the size
that the file states may take. Prints counts, times and memory; the exit status is 1 after any violation.
"""

import argparse
import math
import resource
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from datapipe.sources import demo_photographs
from experiments.inputs import photographs
from models.bitstream import LEAST_SCALE, MAX_SIDE, MIN_SIDE, WHOLE, CodedResidual, pack, unpack
from models.codec import Codec
from models.released import SMALL, load_release
from models.residual_hyperprior import Symbols
from models.residual_networks import hyper_size
from utils.commandline import answer, command_parser, positive
from utils.errors import BitstreamError, DiffoError
from utils.images import read_image

SIDE = 256  # pixels of each picture, from its corner, that are coded
HEADER, CRC_BYTES = 24, 4  # bytes where the header is; of a checksum
Random = np.random.Generator
SECONDS, MEGABYTES = 1.0, 200
SLOWER = 5  # times the processor time per pixel of the valid files: what nonsense may take
QUALITIES = (0, 1, 20, 60, 100)
REFUSED = BitstreamError.__name__
ERRORS = {error.__name__ for error in DiffoError.__subclasses__()}


@dataclass
class Set:
    """Seconds of processor time by outcome, a line per violation, and (height, width) of the largest decoded picture."""

    outcomes: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    violations: list[str] = field(default_factory=list)
    largest: tuple[int, int] = (0, 0)

    def add(self, name: str, outcome: str, seconds: float, allowed: bool, limit: float = SECONDS) -> None:
        self.outcomes[outcome].append(seconds)
        if not allowed or seconds > limit:
            self.violations.append(f"{name}: {outcome} after {seconds:.2f} s of {limit:.2f} s")

    def close(self, name: str, beyond: float, limit: float) -> None:
        """Print counts, times and memory beyond the model, in megabytes."""
        if beyond > limit:
            self.violations.append(f"{name} files: {beyond:.0f} MB beyond the model, more than {limit:.0f}")
        for outcome, seconds in sorted(self.outcomes.items()):
            print(f"{name:10} {outcome:28} {len(seconds):7,d}   slowest {max(seconds):7.3f} s")
        print(f"{name:10} {'memory beyond the model':28} {beyond:7.0f} MB")


def valid_files(codec: Codec, pictures: Iterable[torch.Tensor]) -> list[bytes]:
    """Each picture, uint8 (3, H, W), at several qualities where the weights have levels, and at the last one smaller."""
    qualities = QUALITIES if codec.has_levels else QUALITIES[:1]
    ways = [(quality, WHOLE) for quality in qualities] + [(qualities[-1], WHOLE // 2)]
    return [codec.compress(picture, *way) for picture in pictures for way in ways]


def drawn(draw: Callable[[list[bytes], Random], bytes], files: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """`count` files that `draw` makes of valid `files`, none of them one of these."""
    random = np.random.default_rng(seed)
    while count:
        try:
            data = draw(files, random)
        except BitstreamError:  # such as an empty section, which cannot be written: another one
            continue
        if data not in files:
            count -= 1
            yield data


def altered(files: list[bytes], random: Random) -> bytes:
    """A valid file, mutated, with checksums as they then are."""
    return mutate(_one(files, random), files, random)


def mutate(data: bytes, others: list[bytes], random: Random) -> bytes:
    """One to three parts replaced by nothing, noise, one byte, themselves twice or with flipped bits, or another string.

    A part may be empty, lie in the header, begin with the string or end with it: strings are cut, extended and spliced.
    """
    for _ in range(random.integers(1, 4)):
        reach = min(len(data), _one((HEADER, len(data), len(data)), random))
        start, end = sorted(random.integers(0, reach + 1, 2).tolist())
        ends = ((start, end), (start, min(end, start + 2)), (start, start), (0, end), (start, len(data)))
        start, end = _one(ends, random)
        part, bit = data[start:end], 1 << int(random.integers(8))
        fillings = (
            b"",
            random.bytes(random.integers(1, 9)),
            random.bytes(len(part)),
            bytes([_one((0x00, 0x01, 0x7F, 0x80, 0xFF), random)]) * len(part),
            part + part,
            bytes(byte ^ bit for byte in part),
            _one(others, random)[start:],
        )
        data = data[:start] + _one(fillings, random) + data[end:]
    return data


def resealed(files: list[bytes], random: Random) -> bytes:
    """One layer of a valid file mutated, or both, and the checksums recomputed, each over everything before it."""
    data = _one(files, random)
    end = len(pack(replace(unpack(data), residual=None)))
    file = b""
    for layer in filter(None, (data[: end - CRC_BYTES], data[end:-CRC_BYTES])):
        file += mutate(layer, files, random) if random.integers(3) else layer
        file += zlib.crc32(file).to_bytes(CRC_BYTES, "big")
    return file


def refilled(files: list[bytes], random: Random) -> bytes:
    """A valid file, written with another size, scale, level or section."""
    picture, other = unpack(_one(files, random)), unpack(_one(files, random))
    sides = 2 ** random.uniform(np.log2(MIN_SIDE), np.log2(MAX_SIDE), 2)
    changes = [
        {"height": int(sides[0])},
        {"height": picture.height + int(random.integers(1, 41)), "width": int(sides[1])},
        {"base": mutate(picture.base, [other.base], random)},
        {"fixed_length": not picture.fixed_length, "in_passes": False},
        {"in_passes": not picture.in_passes, "fixed_length": False},
        {"fingerprint": random.bytes(4)},
        {"residual": other.residual},
        {"scale": int(random.integers(LEAST_SCALE, WHOLE + 1))},
    ]
    if residual := picture.residual:
        fields = {"code": int(random.integers(1, 256))}
        fields |= {name: mutate(getattr(residual, name), files, random) for name in ("hyper", "symbols")}
        changes += [{"residual": replace(residual, **{name: value})} for name, value in fields.items()]
    return pack(replace(picture, **_one(changes, random)))


def _one(things, random: Random):
    return things[random.integers(len(things))]


def read_altered(codec: Codec, files: list[bytes], count: int, seed: int = 0) -> Set:
    """The first set: nothing but BitstreamError will do; a preview shows a base that is whole, or nothing."""
    found = Set()
    whole = {unpack(data, preview=True) for data in files}
    for number, data in enumerate(drawn(altered, files, count, seed)):
        name = f"altered file {number}"
        outcome, seconds, _ = attempt(lambda data=data: codec.read(data))
        found.add(name, outcome, seconds, outcome == REFUSED)
        outcome, seconds, contents = attempt(lambda data=data: codec.read(data, preview=True))
        found.add(name, f"preview: {outcome}", seconds, outcome == REFUSED or contents and contents.file in whole)
    return found


def nonsense(codec: Codec, files: list[bytes], random: Random) -> bytes:
    """A file of random symbols, each as likely as any other that the tables can code, up to the largest."""
    file = unpack(_one(files, random))
    h, w = file.latent_size
    k = random.integers(0, codec.params.vq_base.codebook_size, (h, w))
    file = replace(file, **codec.coded_base(k))
    if file.residual is None:
        return pack(file)
    residual, code = codec.residual, int(random.integers(1, 256))
    shape = (codec.params.residual.hyper_channels, *hyper_size(h, w))
    n_z = _random_symbols(*residual.hyper_coding(shape, code), random).reshape(shape)
    index = residual.table_index(n_z, torch.from_numpy(k)[None])
    n = _random_symbols(*residual.residual_coding(index), random).reshape(index.shape)
    return pack(replace(file, residual=CodedResidual(code, *residual.sections(Symbols(n_z, n, index), code))))


def _random_symbols(groups: np.ndarray, tables: np.ndarray, random: Random) -> np.ndarray:
    reach = (np.count_nonzero(tables, axis=1) // 2)[groups]
    return random.integers(-reach, reach + 1)


def decode_resealed(codec: Codec, files: list[bytes], count: int, seed: int = 0) -> Set:
    """The second set, of three kinds: any error of the project, or a picture of the size that was stated."""
    found = Set()
    codec.decompress(files[0])  # the first call is slower
    _, seconds, image = attempt(lambda: codec.decompress(files[0]))
    pace = SLOWER * seconds / image[0].numel()
    kinds = (partial(nonsense, codec), resealed, refilled)
    draws = drawn(lambda files, random: _one(kinds, random)(files, random), files, count, seed)
    for number, data in enumerate(draws):
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
    except BaseException as error:  # a panic of a library in another language is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--weights", type=Path, default=SMALL, metavar="DIR", help="release folder (default: the small one that ships)")
    add("--pictures", type=Path, metavar="DIR", help="pictures (default: demo photographs)")
    add("--mutations", type=positive, default=10_000, metavar="N", help="size of the first set (default 10000)")
    add("--resealed", type=positive, default=1000, metavar="N", help="size of the second set (default 1000)")
    add("--seed", type=int, default=0, metavar="N", help="of both sets (default 0)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # threads that wait for each other would count as processor time
    codec = load_release(args.weights)
    paths = photographs(args.pictures) if args.pictures else demo_photographs()
    files = valid_files(codec, (read_image(path)[:, :SIDE, :SIDE] for path in paths))
    print(f"{len(files)} valid files of {len(paths)} pictures, {min(map(len, files))} to {max(map(len, files))} bytes")
    codec.decompress(files[0])  # what libraries allocate once
    memory = Memory()
    broken = read_altered(codec, files, args.mutations, args.seed)
    broken.close("altered", memory.beyond(), MEGABYTES)
    sealed = decode_resealed(codec, files, args.resealed, args.seed)
    sealed.close("resealed", memory.beyond(), MEGABYTES + codec.memory(*sealed.largest) / 1e6)
    violations = broken.violations + sealed.violations
    print("\n".join(violations[:20] + [f"{len(violations)} violations"]))
    return 1 if violations else 0


def main(argv: list[str] | None = None) -> int:
    return answer(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
