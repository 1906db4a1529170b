"""Where pictures come from: index -> decoded picture, from folders, text lists or tar shards."""

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from datapipe.shards import ShardSource
from datapipe.source import Source
from utils.errors import ConfigError, DiffoError
from utils.images import find_pictures, read_image

Paths = tuple[str, ...] | str | None  # one path or several

KINDS = ("folder", "txt_file_path", "shards")  # keys of the configuration; one of them may be set


class FileSource(Source):
    """One file for each picture.

    Args:
        found: folders, and the files that were found in each, in order.
    """

    def __init__(self, found: Sequence[tuple[Path, Sequence[Path]]], name: str):
        self.found = found
        self.paths = [path for _, paths in found for path in paths]
        super().__init__(name, len(self.paths))

    def read(self, index: int) -> Tensor:
        return read_image(self.paths[index])

    def names(self) -> Iterator[str]:
        for folder, paths in self.found:
            start = os.path.join(folder, "")  # a list may name files elsewhere, on each machine in another place
            yield from (str(path).removeprefix(start) if str(path).startswith(start) else path.name for path in paths)


def open_source(folder: Paths = None, txt_file_path: Paths = None, shards: Paths = None) -> Source:
    """The pictures of folders, lists or shards; the demo photographs if none is named.

    Raises:
        DiffoError: a folder, list, shard or index that is not there or cannot be used, or holds no pictures.
    """
    if shards:
        return ShardSource(several(shards))
    if txt_file_path:
        lists = several(txt_file_path)
        return FileSource([(Path(name).parent, read_list(name)) for name in lists], ", ".join(lists))
    if folder:
        folders = several(folder)
        found = [(Path(f), find_pictures(f, recursive=True)) for f in folders]
        if not any(paths for _, paths in found):
            for tar in (tar for f in folders for tar in Path(f).rglob("*.tar")):
                if tar.suffixes == [".tar"]:  # not a checkpoint, .pth.tar
                    raise ConfigError(f"{', '.join(folders)}: no pictures there, but shards: --data {tar.parent}")
        return FileSource(found, ", ".join(folders))
    demo = demo_photographs()
    return FileSource([(demo[0].parent, demo)], "scikit-image's photographs (no data was named)")


def several(paths: Paths) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths or ())


def read_list(path: str | Path) -> list[Path]:
    """The paths in a text list: one in each line, absolute or relative to the list's folder; empty lines do not count.

    Whether they exist shows when they are read: a list may be long and its disk slow. Raises DiffoError.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DiffoError(f"{path}: no such list") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DiffoError(f"{path}: not a readable text list ({error})") from error
    return [path.parent / line.strip() for line in lines if line.strip()]


def data_options(path: str) -> dict[str, str | None]:
    """What `--data PATH` sets in a configuration: a .txt is a list, a .tar or a folder of them shards, else a folder."""
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
