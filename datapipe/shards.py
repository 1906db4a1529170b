"""Tar shards of the WebDataset format, read at random through an index beside each.

A sample is what stands together under one key (the member's name up to the first dot of its last part); its picture is
the member with a picture's suffix, one without a further dot before others. `<shard>.tar.index.npy` holds int64 rows:
first (version, fingerprint of the tar), then (offset, length) of every picture.
"""

import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from itertools import groupby
from pathlib import Path

import numpy as np
from torch import Tensor

from datapipe.source import Source
from utils.errors import DiffoError, PictureError
from utils.files import PICTURES, atomic_path
from utils.images import decode_image

VERSION = 2
COMMAND = "python -m datapipe.prepare index"
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key and suffix, as WebDataset parts them


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
        try:
            # Opened anew each time: an open file's position would be shared by all processes that decode.
            with open(tar, "rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError as error:
            raise PictureError(f"{tar}: cannot be read ({error.strerror})") from error
        return decode_image(data, f"{tar}, picture at byte {offset}")


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """The tar files that folders and patterns name, sorted within each.

    Raises:
        DiffoError: a pattern that names none, or a compressed tar.
    """
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
                raise DiffoError(f"{name}: no such shard")
            found += tars
    for tar in found:
        if tar.suffix != ".tar":
            raise DiffoError(f"{tar}: not a .tar; a compressed one cannot be read at random: unpack it (gunzip) first")
    return found


def index_path(tar: Path) -> Path:
    return tar.with_name(tar.name + ".index.npy")


def load_index(tar: Path) -> np.ndarray:
    """Offset and length, int64 (n, 2), of the pictures in a tar, from the file beside it. Raises DiffoError."""
    path = index_path(tar)
    try:
        rows = np.load(path, allow_pickle=False)
        if rows.dtype != np.int64 or rows[:1].tolist() != [[VERSION, _fingerprint(tar)]]:
            raise ValueError("the tar has changed since, or it is of another version")
    except FileNotFoundError:
        raise DiffoError(f"{tar}: no index beside it; make one: {COMMAND} {tar}") from None
    except (OSError, ValueError, EOFError) as error:
        raise DiffoError(f"{path}: not an index of this tar ({error}); make it anew: {COMMAND} {tar}") from error
    return rows[1:]


def write_index(tar: Path) -> tuple[int, int]:
    """Write the index of a tar beside it; the number of pictures and of samples without one.

    Raises:
        DiffoError: no tar, or one that is cut short.
    """
    try:
        rows, samples = [(VERSION, _fingerprint(tar))], 0
        with tarfile.open(tar, "r:") as file:
            for _, sample in groupby(_members(file), key=lambda member: member[0]):
                samples += 1
                pictures = [(suffix, info) for _, suffix, info in sample if f".{suffix}".endswith(PICTURES)]
                if pictures:
                    _, picture = min(pictures, key=lambda one: "." in one[0])
                    rows.append((picture.offset_data, picture.size))
    except (OSError, tarfile.TarError) as error:
        raise DiffoError(f"{tar}: not a tar, damaged or cut short ({error})") from error
    with atomic_path(index_path(tar)) as temporary, temporary.open("wb") as output:
        np.save(output, np.array(rows, dtype=np.int64))
    return len(rows) - 1, samples - len(rows) + 1


def write_shards(paths: Iterable[Path], folder: Path, name: str, max_count: int, max_bytes: int) -> None:
    """Pack picture files, as they are and in this order, into `<folder>/<name>-<number>.tar`, then index the tars.

    A key is the picture's number and name, its dots replaced: keys have none. The same files give the same bytes. If
    it is broken off, by an interrupt too, its tars go.

    Raises:
        PictureError: a file that cannot be read.
    """
    from webdataset import ShardWriter

    pattern = str(folder / name).replace("%", "%%") + "-%06d.tar"
    try:
        with ShardWriter(pattern, max_count, max_bytes, verbose=0, encoder=False, mtime=0) as writer:
            for position, path in enumerate(paths):
                key = f"{position:09d}_{path.stem.replace('.', '_')}"
                writer.write({"__key__": key, path.suffix[1:].lower(): _content(path)})
        for tar in find_shards([str(folder)]):
            write_index(tar)
    except BaseException:
        for part in folder.iterdir():
            if part.name.startswith(f"{name}-"):
                part.unlink()
        raise


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        told = f"{path}: cannot be read ({error.strerror}); --check leaves out what cannot be read"
        raise PictureError(told) from error


def _fingerprint(tar: Path) -> int:
    """CRC-32 of the size, the first header and the last record (10240 bytes): adding, removing, packing anew show."""
    with open(tar, "rb") as file:
        first = file.read(tarfile.BLOCKSIZE)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tarfile.RECORDSIZE))
        return zlib.crc32(b"%d " % size + first + file.read())


def _members(file: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, suffix and place of every file in a tar that belongs to a sample."""
    while member := file.next():
        file.members = []  # tarfile would keep them all
        if member.isreg() and (parted := _MEMBER.fullmatch(member.name)):
            yield parted[1], parted[2].lower(), member
