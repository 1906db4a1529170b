"""Inputs that experiments share: photographs, releases, and what a table says of how it was made."""

import argparse
import copy
import importlib.metadata
import os
import platform
import subprocess
import zlib
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from coding.plan import inputs
from datapipe.sources import demo_photographs
from models.codec import Codec
from models.released import SMALL, load_release
from utils.distributed import gather_objects, is_main, local_device, world_size
from utils.errors import DiffoError
from utils.files import atomic_write, make_folder
from utils.version import __version__

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    *("torch", "numpy", "constriction", "pillow", "pillow-heif", "pillow-jxl-plugin"),
    *("pyiqa", "pytorch-msssim", "stlpips-pytorch", "cvvdp", "torchmetrics", "bjontegaard"),
)


def photographs(folder: Path, limit: int | None = None) -> list[Path]:
    """At most `limit` pictures of a folder and those below it, spread evenly over its sorted names.

    Raises:
        DiffoError: the folder has none, or is not there.
    """
    return [path for path, _ in _found(folder, limit)]


def named_photographs(folder: Path, limit: int | None = None) -> dict[str, Path]:
    """`photographs` by their names relative to the folder. Raises DiffoError, too, for two of one stem."""
    found, stems = _found(folder, limit), {}
    for path, relative in found:
        if (other := stems.setdefault(relative.with_suffix(""), path)) != path:
            raise DiffoError(f"{other} and {path} have one stem, and so would their files; rename one")
    return {str(relative): path for path, relative in found}


def demo_folder(folder: Path) -> Path:
    """A folder with the photographs that scikit-image ships, which the main process fills."""
    if is_main():
        make_folder(folder)
        for path in demo_photographs():
            atomic_write(folder / path.name, path.read_bytes())
    gather_objects([])  # the other processes wait for it
    return folder


def _found(folder: Path, limit: int | None) -> list[tuple[Path, Path]]:
    """`photographs`, each with its name relative to the folder."""
    found = inputs([folder], streams=False, recursive=True)
    return spread(found, limit or len(found))


def spread(values: Sequence, count: int) -> list:
    """At most `count` of the values, evenly spread, both ends among them."""
    last, count = len(values) - 1, min(count, len(values))
    return [values[i] for i in dict.fromkeys(round(last * k / max(1, count - 1)) for k in range(count))]


def checksum(path: Path) -> str:
    """CRC-32 of a file's content, hexadecimal: rows of a picture stand as long as it is the same."""
    return f"{zlib.crc32(path.read_bytes()):08x}"


def releases_of(
    args: argparse.Namespace, decoders: Sequence[str] = ("full",), rdo: float | None = None
) -> dict[str, Codec]:
    """The codecs of --weights by their folders' names, in the order in which they were given; they code as the command does.

    Args:
        decoders: each release with each of them; `<name>-light` is the one with its light decoder.
        rdo: not None, there is `<name>-rdo-<rdo>` of each as well, with this weight of the base's bits.
    Raises:
        DiffoError: two of one name. CheckpointError: as `load_release`.
    """
    folders = args.weights or [SMALL]
    wanted = {
        folder.resolve().name + ("-light" if decoder == "light" else ""): (folder, decoder)
        for folder in folders
        for decoder in decoders
    }
    if len(wanted) < len(folders) * len(set(decoders)):
        raise DiffoError("--weights: two releases of one folder name, which their rows would share; rename one")
    found = {
        name: load_release(folder, local_device(args.device), decoder) for name, (folder, decoder) in wanted.items()
    }
    for name in wanted if rdo is not None else ():
        if (other := f"{name}-rdo-{rdo:g}") in found:
            raise DiffoError(f"--weights {other}: the name that --rdo gives to {name}; rename the folder")
        found[other] = codec = copy.copy(found[name])
        codec.choose_by_rate(rdo)
    return found


def weights_of(codec: Codec) -> str:
    """The weights that pictures were coded with, in words: a row stands as long as they are the same."""
    light = f", light decoder {codec.light.sha256[:8]}" if codec.light else ""
    rdo = f", rdo {codec.rdo:g}" if codec.rdo else ""
    return f"weights {codec.fingerprint.hex()}{light}{rdo}"


def about(args: argparse.Namespace, releases: dict[str, Codec], **more: object) -> dict:
    """How a table was made, for whoever finds it later: command, weights, commit, hardware, libraries."""
    device = local_device(args.device)
    return {
        "command": args.command,
        "date": date.today().isoformat(),
        "weights": {name: codec.fingerprint.hex() for name, codec in releases.items()},
        "parameters": {name: sum(p.numel() for p in codec.parameters()) for name, codec in releases.items()},
        "version": __version__,
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "libraries": {"python": platform.python_version()} | versions(LIBRARIES),
    } | more


def commit() -> str | None:
    """The commit of this source, with `-dirty` where files differ from it; None outside a repository of its own."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a disk that sleeps
        return None
    return done.stdout.strip() or None


def processor() -> str:
    """The CPU's name and its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
