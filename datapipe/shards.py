"""Tar shards of the WebDataset format, read at random through an index beside each.

A sample is what stands together under one key (the member's name up to the first dot of its last part); its picture is
the member with a picture's suffix, one without a further dot before others. `<shard>.tar.index.npy` holds int64 rows:
first (version, fingerprint of the tar), then (offset, length) of every picture's member, headers included.
"""

import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import groupby
from pathlib import Path

import numpy as np
from torch import Tensor

from datapipe.source import Source
from utils.errors import DiffoError, PictureError
from utils.files import PICTURES, atomic_path
from utils.images import decode_image

VERSION = 1
COMMAND = "python -m datapipe.prepare index"


class ShardSource(Source):
    """The pictures of tar shards, in the order of the shards and of their members.

    Args:
        patterns: shards, folders of shards, `*` or `{000..127}` patterns.
    Raises:
        DiffoError: a shard that is missing or compressed, or an index that is missing or of another tar.
    """

    def __init__(self, patterns: Sequence[str]):
        self.tars = find_shards(patterns)
        # Read, not mapped: a mapped file stays open, and there may be more shards than open files are allowed.
        indexes = [load_index(tar) for tar in self.tars]
        self._starts = np.cumsum([0, *map(len, indexes)])
        self._places = np.concatenate(indexes)
        super().__init__(", ".join(patterns), len(self._places))

    def names(self) -> Iterator[str]:
        counts = np.diff(self._starts)
        return (f"{tar.name} {_fingerprint(tar)} {count}" for tar, count in zip(self.tars, counts, strict=True))

    def read(self, index: int) -> Tensor:
        tar = self.tars[int(np.searchsorted(self._starts, index, side="right")) - 1]
        offset, length = map(int, self._places[index])
        where = f"{tar}: picture at byte {offset} cannot be read"
        try:
            # Opened anew each time: an open file's position would be shared by all processes that decode.
            with open(tar, "rb") as file:
                file.seek(offset)
                block = io.BytesIO(file.read(length))
            with tarfile.open(fileobj=block, mode="r:") as member:
                info = member.next()
                data = member.extractfile(info).read() if info and info.isreg() else None
        except (OSError, tarfile.TarError) as error:
            raise PictureError(f"{where} ({error}); is the tar whole?") from error
        if data is None:  # zeros read as the end of a tar
            raise PictureError(f"{where} (no file starts there); is the tar whole?")
        return decode_image(data, f"{tar}: {info.name}")


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """The tar files that folders and patterns name, sorted within each. Raises DiffoError if one names none."""
    from braceexpand import UnbalancedBracesError, braceexpand

    found: list[Path] = []
    for pattern in patterns:
        try:
            names = list(braceexpand(str(pattern)))
        except UnbalancedBracesError as error:
            raise DiffoError(f"{pattern}: braces that do not match") from error
        for name in names:
            if Path(name).is_dir():
                tars = sorted(Path(name).glob("*.tar"))
            else:
                tars = [Path(name)] if Path(name).is_file() else [Path(p) for p in sorted(glob(name))]
            if not tars:
                raise DiffoError(f"{name}: no such shard" + ("" if name == str(pattern) else f" (from {pattern})"))
            found += tars
    return found


def index_path(tar: Path) -> Path:
    return tar.with_name(tar.name + ".index.npy")


def load_index(tar: Path) -> np.ndarray:
    """Offset and length, int64 (n, 2), of the pictures in a tar, from the file beside it. Raises DiffoError."""
    path = index_path(tar)
    _refuse_compressed(tar)
    try:
        rows = np.load(path, allow_pickle=False)
        fingerprint = _fingerprint(tar)
    except FileNotFoundError:
        raise DiffoError(f"{tar}: no index beside it; make one: {COMMAND} {tar}") from None
    except (OSError, ValueError, EOFError) as error:
        raise DiffoError(f"{path}: not a readable index ({error}); make it anew: {COMMAND} {tar}") from error
    if rows.dtype != np.int64 or rows.ndim != 2 or rows.shape[1] != 2 or len(rows) < 1 or rows[0, 0] != VERSION:
        raise DiffoError(f"{path}: not an index of version {VERSION}; make it anew: {COMMAND} {tar}")
    if rows[0, 1] != fingerprint:
        raise DiffoError(f"{path}: the tar has changed since; make the index anew: {COMMAND} {tar}")
    return rows[1:]


def write_index(tar: Path) -> tuple[int, int]:
    """Write the index of a tar beside it; the number of pictures and of samples without one.

    Raises DiffoError: no tar, compressed, or cut short.
    """
    _refuse_compressed(tar)
    without = 0
    try:
        rows = [(VERSION, _fingerprint(tar))]
        with tarfile.open(tar, "r:") as file:
            for _, members in groupby(_members(file), key=lambda member: _key(member.name)[0]):
                picture = _picture(list(members))
                if picture is None:
                    without += 1
                else:
                    rows.append((picture.offset, picture.offset_data + picture.size - picture.offset))
    except (OSError, tarfile.TarError) as error:
        raise DiffoError(f"{tar}: not a tar, damaged or cut short ({error})") from error
    with atomic_path(index_path(tar)) as temporary, temporary.open("wb") as output:
        np.save(output, np.array(rows, dtype=np.int64))
    return len(rows) - 1, without


def write_shards(paths: Sequence[Path], folder: Path, name: str, max_count: int, max_bytes: int) -> Iterator[Path]:
    """Pack picture files, as they are and in this order, into `<folder>/<name>-<number>.tar`, each with its index.

    Yields each picture's path when it is packed. A key is the picture's number and name, its dots replaced: keys have
    none. The same files give the same bytes. Raises DiffoError if a file cannot be read.
    """
    from webdataset import TarWriter

    start = 0
    for number, count in enumerate(_counts(paths, max_count, max_bytes)):
        tar = folder / f"{name}-{number:06d}.tar"
        with atomic_path(tar) as temporary, TarWriter(str(temporary), encoder=False, mtime=0) as writer:
            for position, path in enumerate(paths[start : start + count], start):
                key = f"{position:09d}_{path.stem.replace('.', '_')}"
                writer.write({"__key__": key, path.suffix[1:].lower(): _content(path)})
                yield path
        write_index(tar)
        start += count


def _fingerprint(tar: Path) -> int:
    """CRC-32 of the size, the first header and the last record (10240 bytes): adding, removing, packing anew show."""
    with open(tar, "rb") as file:
        first = file.read(tarfile.BLOCKSIZE)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tarfile.RECORDSIZE))
        return zlib.crc32(b"%d " % size + first + file.read())


def _counts(paths: Sequence[Path], max_count: int, max_bytes: int) -> Iterator[int]:
    """How many pictures each shard takes: as many as both limits allow, but at least one."""
    count = total = 0
    for path in paths:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise _unreadable(path, error) from error
        if count and (count == max_count or total + size > max_bytes):
            yield count
            count = total = 0
        count, total = count + 1, total + size
    if count:
        yield count


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DiffoError:
    return DiffoError(f"{path}: cannot be read ({error.strerror or error}); --check leaves such files out")


def _members(file: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a tar that belong to samples: those with a name before the first dot."""
    while member := file.next():
        file.members = []  # tarfile would keep them all
        if member.isreg() and all(_key(member.name)):
            yield member


def _key(name: str) -> tuple[str, str]:
    """Key and suffix of a member, as WebDataset has them: parted at the first dot of the last part of the name."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return (folder + slash + stem if stem else ""), suffix.lower()


def _picture(members: list[tarfile.TarInfo]) -> tarfile.TarInfo | None:
    pictures = [m for m in members if m.name.lower().endswith(PICTURES)]
    plain = [m for m in pictures if "." not in _key(m.name)[1]]
    return (plain or pictures or [None])[0]


def _refuse_compressed(tar: Path) -> None:
    if tar.suffix != ".tar":
        raise DiffoError(f"{tar}: not a .tar; a compressed one cannot be read at random: unpack it (gunzip) first")
