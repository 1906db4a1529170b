"""Altered `.dfo` files, seeded: as a bad disk or an enemy may hand them in."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from models.bitstream import MAX_SIDE, MIN_SIDE, CodedPicture, pack, unpack
from utils.errors import BitstreamError

CRC_BYTES = 4
HEADER = 24  # bytes where the header is
Random = np.random.Generator


def altered(files: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """`count` mutations of valid files, checksums as they then are; none of them is one of the files."""
    return _drawn(lambda random: mutate(_one(files, random), files, random), files, count, seed)


def resealed(files: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """`count` mutations of valid files, none of them one of the files, whose checksums have been recomputed."""
    return _drawn(lambda random: _one((_sealed_bytes, _sealed_fields), random)(files, random), files, count, seed)


def _drawn(draw: Callable[[Random], bytes], files: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    random = np.random.default_rng(seed)
    while count:
        data = draw(random)
        if data not in files:
            count -= 1
            yield data


def _one(things, random: Random):
    return things[random.integers(len(things))]


def mutate(data: bytes, others: list[bytes], random: Random) -> bytes:
    """One to three mutations of a string: bits flipped, or a part replaced."""
    for _ in range(_one((1, 1, 2, 3), random)):
        data = flip_bits(data, random) if random.integers(6) == 0 else replace_part(data, _one(others, random), random)
    return data


def flip_bits(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for at in random.integers(0, 8 * len(data), random.integers(1, 5)) if data else []:
        changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def replace_part(data: bytes, other: bytes, random: Random) -> bytes:
    """A part replaced by nothing, noise, one byte again and again, itself twice or turned over, or a part of another string.

    The part may be short or empty, lie in the header, begin with the string or end with it: so strings are cut at either
    end, extended, and spliced.
    """
    start, end = _part(data[: _one((HEADER, len(data), len(data)), random)], random)
    start, end = _one(
        ((start, end), (start, min(end, start + 5)), (start, start), (0, end), (start, len(data))), random
    )
    part, middle = data[start:end], random.integers(start, end + 1)
    fillings = (
        b"",
        random.bytes(random.integers(1, 9)),
        random.bytes(len(part)),
        bytes([_one((0x00, 0x01, 0x7F, 0x80, 0xFF), random)]) * len(part),
        part + part,
        data[middle:end] + data[start:middle],
        other[slice(*_part(other, random))],
        other[random.integers(len(other) + 1) :],
    )
    return data[:start] + _one(fillings, random) + data[end:]


def _part(data: bytes, random: Random) -> tuple[int, int]:
    start, end = sorted(random.integers(0, len(data) + 1, 2).tolist())
    return start, end


# Files with checksums that match --------------------------------------------------------------------------------------


def sealed(content: bytes) -> bytes:
    """A layer of a file with its checksum, which covers everything before it."""
    return content + zlib.crc32(content).to_bytes(CRC_BYTES, "big")


def _sealed_bytes(files: list[bytes], random: Random) -> bytes:
    """Any bytes changed, with those that say what follows; one layer or both."""
    data = _one(files, random)
    base_end = len(pack(replace(unpack(data), residual=None)))
    base, rest = data[: base_end - CRC_BYTES], data[base_end:-CRC_BYTES]
    which = random.integers(3) if rest else 0
    base = sealed(mutate(base, files, random) if which != 1 else base)
    return sealed(base + (mutate(rest, files, random) if which != 0 else rest)) if rest else base


def _sealed_fields(files: list[bytes], random: Random) -> bytes:
    """Another size, level or section in a file that is written as it should be."""
    picture, other = unpack(_one(files, random)), unpack(_one(files, random))
    while True:
        try:
            for _ in range(random.integers(1, 3)):
                picture = _with_another_field(picture, other, random)
            return pack(picture)
        except BitstreamError:  # such as an empty section, which cannot be written: another one
            continue


def _with_another_field(picture: CodedPicture, other: CodedPicture, random: Random) -> CodedPicture:
    def section(own: bytes, its: bytes) -> bytes:
        return its if random.integers(4) == 0 else mutate(own, [own, its], random)

    def side(own: int) -> int:
        near, anywhere = own + random.integers(-40, 41), 2 ** random.uniform(np.log2(MIN_SIDE), np.log2(MAX_SIDE))
        return max(MIN_SIDE, int(near if random.integers(2) else anywhere))

    residual, its = picture.residual, other.residual
    changes = [
        lambda: {"height": side(picture.height)},
        lambda: {"width": side(picture.width)},
        lambda: {"height": picture.width, "width": picture.height},
        lambda: {"base": section(picture.base, other.base)},
        lambda: {"fixed_length": not picture.fixed_length},
        lambda: {"fingerprint": random.bytes(4)},
        lambda: {"residual": its},
    ]
    if residual and its:
        changes += [
            lambda: {"residual": replace(residual, level=int(random.integers(1, 256)))},
            lambda: {"residual": replace(residual, hyper=section(residual.hyper, its.hyper))},
            lambda: {"residual": replace(residual, symbols=section(residual.symbols, its.symbols))},
        ]
    return replace(picture, **_one(changes, random)())
