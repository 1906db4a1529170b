"""Where pictures come from: index -> decoded picture, from folders, text lists or tar shards."""

import os
from array import array
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from torch import Tensor

from datapipe.shards import ShardSource
from datapipe.source import Source
from utils.errors import DiffoError
from utils.files import PICTURES, scan, tell_left_out
from utils.images import read_image

Paths = tuple[str, ...] | str | None  # one path or several

KINDS = ("folder", "txt_file_path", "shards")  # keys of the configuration; one of them may be set


class FileSource(Source):
    """One file for each picture.

    Their names stand in one buffer: a million Path objects take 300 MB, and again in every worker, whose pages are
    copied when it counts references.

    Args:
        found: folders, and the files that were found in each, in order.
        left_out: what else is there; filled while `found` is read.
    """

    def __init__(self, found: Iterable[tuple[str, Iterable[str]]], name: str, left_out: Counter[str] | None = None):
        names, ends = bytearray(), array("q", [0])
        self._folders: list[str] = []
        self._firsts: list[int] = []  # index of the first file of each folder
        for folder, paths in found:
            start = os.path.join(folder, "")
            self._folders.append(start)
            self._firsts.append(len(ends) - 1)
            for path in paths:
                names += os.fsencode(path.removeprefix(start))
                ends.append(len(names))
        self._names, self._ends = bytes(names), np.array(ends)
        super().__init__(name, len(ends) - 1, tell_left_out(left_out or Counter()))

    def path(self, index: int) -> str:
        """The file of a picture."""
        return os.path.join(self._folders[bisect(self._firsts, index) - 1], self._name(index))

    def read(self, index: int) -> Tensor:
        return read_image(self.path(index))

    def names(self) -> Iterator[str]:
        # A list may name files elsewhere, on each machine in another place.
        names = (self._name(index) for index in range(len(self)))
        return (os.path.basename(name) if os.path.isabs(name) else name for name in names)

    def _name(self, index: int) -> str:
        """Of a file, relative to its folder, or absolute if it is not in it."""
        return os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]])


def open_source(folder: Paths = None, txt_file_path: Paths = None, shards: Paths = None) -> Source:
    """The pictures of folders, lists or shards; the demo photographs if none is named.

    Raises:
        DiffoError: a folder, list, shard or index that is not there or cannot be used, or holds no pictures.
    """
    if shards:
        return ShardSource(several(shards))
    if txt_file_path:
        lists = several(txt_file_path)
        return FileSource([(os.path.dirname(name), read_list(name)) for name in lists], ", ".join(lists))
    if folder:
        folders = several(folder)
        left_out: Counter[str] = Counter()
        found = ((f, scan(f, PICTURES, True, left_out)) for f in folders)
        return FileSource(found, ", ".join(folders), left_out)
    demo = demo_photographs()
    return FileSource([("", map(str, demo))], "scikit-image's photographs (no data was named)")


def several(paths: Paths) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths or ())


def read_list(path: str) -> Iterator[str]:
    """The paths in a text list: one in each line, absolute or relative to the list's folder; empty lines do not count.

    Whether they exist shows when they are read: a list may be long and its disk slow. Raises DiffoError.
    """
    try:
        with open(path, encoding="utf-8-sig") as lines:
            yield from (os.path.join(os.path.dirname(path), line.strip()) for line in lines if line.strip())
    except FileNotFoundError:
        raise DiffoError(f"{path}: no such list") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DiffoError(f"{path}: not a readable text list ({error})") from error


def data_options(path: str) -> dict[str, str | None]:
    """The configuration keys that `--data PATH` sets: a .txt is a list, a .tar or a folder of them shards, else a folder."""
    kind = "folder"
    if path.endswith(".txt"):
        kind = "txt_file_path"
    elif path.endswith((".tar", ".tar.gz", ".tgz")) or (Path(path).is_dir() and any(Path(path).glob("*.tar"))):
        kind = "shards"
    return {f"data.{key}": path if key == kind else None for key in KINDS}


def demo_photographs() -> list[Path]:
    """Natural photographs that scikit-image ships, for trying things out without any data.

    Raises:
        DiffoError: scikit-image is not installed.
    """
    found = find_spec("skimage")
    if found is None:
        raise DiffoError("the demo photographs come with scikit-image: pip install scikit-image, or name your own")
    folder = Path(found.origin).parent / "data"
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
    return [folder / name for name in names if (folder / name).is_file()]
