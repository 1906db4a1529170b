"""Altered `.dfo` files, seeded: as a bad disk or an enemy may hand them in."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from models.bitstream import MAX_SIDE, MIN_SIDE, CodedPicture, pack, unpack
from utils.errors import BitstreamError

CRC_BYTES = 4
Random = np.random.Generator


def altered(files: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """`count` mutations of valid files, checksums as they then are; none of them is one of the files."""
    random = np.random.default_rng(seed)
    while count:
        data = mutate(files[random.integers(len(files))], files, random)
        if data not in files:
            count -= 1
            yield data


def resealed(files: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """`count` mutations of valid files, none of them one of the files, whose checksums have been recomputed."""
    random = np.random.default_rng(seed)
    while count:
        data = random.choice([_sealed_bytes, _sealed_fields])(files, random)
        if data not in files:
            count -= 1
            yield data


def mutate(data: bytes, others: list[bytes], random: Random) -> bytes:
    """One to three mutations of a string, of a kind drawn at random."""
    for _ in range(random.choice([1, 1, 2, 3])):
        data = MUTATIONS[random.integers(len(MUTATIONS))](data, others, random)
    return data


# Kinds of mutation: (string, strings to take parts from, random numbers) -> string ------------------------------------


def _flip_bits(data: bytes, others: list[bytes], random: Random) -> bytes:
    changed = bytearray(data)
    for at in random.integers(0, 8 * len(data), random.integers(1, 5)) if data else []:
        changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def _set_bytes(data: bytes, others: list[bytes], random: Random) -> bytes:
    """A few bytes anywhere, or in the first 24, where the header is."""
    start, end = _part(data, random) if random.integers(2) else _part(data[:24], random)
    end = min(end, start + 5)
    extreme = bytes([random.choice([0x00, 0x01, 0x7F, 0x80, 0xFF])])
    return data[:start] + (random.bytes(end - start) if random.integers(2) else extreme * (end - start)) + data[end:]


def _cut(data: bytes, others: list[bytes], random: Random) -> bytes:
    return data[: random.integers(0, len(data) + 1)]


def _cut_front(data: bytes, others: list[bytes], random: Random) -> bytes:
    return data[random.integers(0, len(data) + 1) :]


def _extend(data: bytes, others: list[bytes], random: Random) -> bytes:
    other = others[random.integers(len(others))]
    return data + (other, random.bytes(random.integers(1, 40)), bytes(random.integers(1, 9)))[random.integers(3)]


def _remove(data: bytes, others: list[bytes], random: Random) -> bytes:
    start, end = _part(data, random)
    return data[:start] + data[end:]


def _duplicate(data: bytes, others: list[bytes], random: Random) -> bytes:
    start, end = _part(data, random)
    return data[:end] + data[start:end] + data[end:]


def _insert(data: bytes, others: list[bytes], random: Random) -> bytes:
    at = random.integers(0, len(data) + 1)
    return data[:at] + random.bytes(random.integers(1, 9)) + data[at:]


def _swap(data: bytes, others: list[bytes], random: Random) -> bytes:
    """Two neighbouring parts."""
    start, end = _part(data, random)
    middle = random.integers(start, end + 1)
    return data[:start] + data[middle:end] + data[start:middle] + data[end:]


def _overwrite(data: bytes, others: list[bytes], random: Random) -> bytes:
    """A part by zeros, or by what stands elsewhere."""
    start, end = _part(data, random)
    at = random.integers(0, len(data) + 1)
    filling = bytes(end - start) if random.integers(2) else data[at:][: end - start].ljust(end - start, b"\0")
    return data[:start] + filling + data[end:]


def _splice(data: bytes, others: list[bytes], random: Random) -> bytes:
    """The beginning of one string and the end of another."""
    other = others[random.integers(len(others))]
    return data[: random.integers(0, len(data) + 1)] + other[random.integers(0, len(other) + 1) :]


def _noise(data: bytes, others: list[bytes], random: Random) -> bytes:
    """Noise behind a beginning."""
    start = random.integers(0, min(24, len(data)) + 1)
    return data[:start] + random.bytes(len(data) - start)


MUTATIONS: list[Callable[[bytes, list[bytes], Random], bytes]] = [
    _flip_bits,
    _flip_bits,
    _set_bytes,
    _set_bytes,
    _cut,
    _cut_front,
    _extend,
    _remove,
    _duplicate,
    _insert,
    _swap,
    _overwrite,
    _splice,
    _noise,
]


def _part(data: bytes, random: Random) -> tuple[int, int]:
    start, end = sorted(random.integers(0, len(data) + 1, 2).tolist())
    return start, end


# Files with checksums that match --------------------------------------------------------------------------------------


def sealed(content: bytes) -> bytes:
    """A layer of a file with its checksum, which covers everything before it."""
    return content + zlib.crc32(content).to_bytes(CRC_BYTES, "big")


def _sealed_bytes(files: list[bytes], random: Random) -> bytes:
    """Any bytes changed, with those that say what follows; one layer or both."""
    data = files[random.integers(len(files))]
    base_end = len(pack(replace(unpack(data), residual=None)))
    base, rest = data[: base_end - CRC_BYTES], data[base_end:-CRC_BYTES]
    which = random.integers(3) if rest else 0
    base = sealed(mutate(base, files, random) if which != 1 else base)
    return sealed(base + (mutate(rest, files, random) if which != 0 else rest)) if rest else base


def _sealed_fields(files: list[bytes], random: Random) -> bytes:
    """Another size, level or section in a file that is written as it should be."""
    picture, other = (unpack(files[random.integers(len(files))]) for _ in range(2))
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
        lambda: replace(picture, height=side(picture.height)),
        lambda: replace(picture, width=side(picture.width)),
        lambda: replace(picture, height=picture.width, width=picture.height),
        lambda: replace(picture, base=section(picture.base, other.base)),
        lambda: replace(picture, fixed_length=not picture.fixed_length),
        lambda: replace(picture, fingerprint=random.bytes(4)),
        lambda: replace(picture, residual=its),
    ]
    if residual and its:
        changes += [
            lambda: replace(picture, residual=replace(residual, level=int(random.integers(1, 256)))),
            lambda: replace(picture, residual=replace(residual, hyper=section(residual.hyper, its.hyper))),
            lambda: replace(picture, residual=replace(residual, symbols=section(residual.symbols, its.symbols))),
        ]
    return changes[random.integers(len(changes))]()
