"""Files that are either complete or absent: written beside their place, synced, then renamed into it."""

import errno
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from utils.errors import DiffoError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What the disk, not the caller's code, can answer while a file is being written.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK_ERRORS = _FULL | {errno.EROFS, errno.EIO}

HEIF = (".heic", ".heif", ".hif")
HEIF_HINT = " (pip install pillow-heif)"

# Suffixes of what `utils.images` reads: Pillow's still pictures of grey values and colours, and HEIF where it can.
PICTURES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".avifs", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".tga", ".icb", ".vda", ".vst", ".qoi", ".psd", ".pcx", ".dcx", ".ico", ".icns", ".cur", ".dds", ".ftc", ".ftu"),
    *(".sgi", ".rgb", ".rgba", ".bw", ".ras", ".pxr", ".pcd", ".xbm", ".xpm", ".im", ".msp", ".gbr", ".blp"),
    *(".fli", ".flc"),
    *(HEIF if find_spec("pillow_heif") else ()),
)
_KINDS_NAMED = 5  # of those that were left out


def find_files(
    folder: str | os.PathLike[str],
    suffixes: tuple[str, ...],
    recursive: bool = False,
    left_out: Counter[str] | None = None,
) -> list[Path]:
    """Sorted paths of the files in a folder with one of these suffixes, in any case; an empty list if there are none.

    Hidden files and, when `recursive`, hidden folders are skipped; linked folders are entered, unless they lead back.
    What other files are there is counted in `left_out`, for `tell_left_out`, by kind and reason.
    Raises DiffoError if `folder` is missing, not a folder, or cannot be listed.
    """
    return [Path(name) for name in scan(folder, suffixes, recursive, left_out)]


def scan(
    folder: str | os.PathLike[str],
    suffixes: tuple[str, ...],
    recursive: bool = False,
    left_out: Counter[str] | None = None,
) -> Iterator[str]:
    """The paths of `find_files` one by one, as text: a Path for each of a million names takes seconds."""
    if not os.path.isdir(folder):
        raise DiffoError(f"{folder}: no such folder")
    return _scan(os.fspath(folder), suffixes, recursive, Counter() if left_out is None else left_out, ())


def _scan(
    folder: str, suffixes: tuple[str, ...], recursive: bool, left_out: Counter[str], above: tuple[str, ...]
) -> Iterator[str]:
    """`scan`; `above`: the real paths of the folders on the way here."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as found:
            # Sorted by name in each folder, which is the order of Path: "a/b" before "a.b".
            entries = sorted((entry for entry in found if entry.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise DiffoError(f"{folder}: cannot be listed ({error.strerror})") from error
    for entry in entries:
        link = entry.is_symlink()  # of which entry's own answers may be errors
        if os.path.isdir(entry.path) if link else entry.is_dir():
            if recursive:
                yield from _scan(entry.path, suffixes, recursive, left_out, (*above, real))
            continue
        file = os.path.isfile(entry.path) if link else entry.is_file()
        if file and entry.name.lower().endswith(suffixes):
            yield entry.path
        else:
            left_out[_kind(entry.name) + (": no reader" if file else ": not a file")] += 1


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def tell_left_out(left_out: Counter[str]) -> str:
    """What was left out, to go on a line with what was taken: ", 3 .heic: no reader", and nothing if there is nothing."""
    named = left_out.most_common(_KINDS_NAMED)
    parts = [f", {count} {kind}{HEIF_HINT if kind.startswith(HEIF) else ''}" for kind, count in named]
    if rest := left_out.total() - sum(count for _, count in named):
        parts.append(f", and {rest} of other kinds")
    return "".join(parts)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder `path`, made with its parents where it is not there. Raises DiffoError if it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiffoError(f"{path}: this folder cannot be made ({error.strerror})") from error
    return Path(path)


@contextmanager
def made_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`make_folder` for a block that writes into it: of the folders that were made, those left empty are removed."""
    missing = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    try:
        yield make_folder(path)
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def require_writable(folder: Path) -> None:
    """Raise DiffoError, before any work, if no file can be written into a folder."""
    probe = folder / f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise DiffoError(f"{folder}: no file can be written into this folder ({error.strerror})") from error


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a folder, or a file, made where it is not there, for this process alone, until the block or the process ends.

    Raises DiffoError if another process holds it. Where the system or the disk has no locks, nothing is held.
    """
    if fcntl is None:
        yield
        return
    flags = os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT | os.O_APPEND
    descriptors = [os.open(path, flags, 0o666)]

    def close() -> None:
        while descriptors:
            os.close(descriptors.pop())

    os.register_at_fork(after_in_child=close)  # processes that decode outlive a killed one by seconds
    try:
        fcntl.flock(descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        close()
        folder = path if path.is_dir() else path.parent
        raise DiffoError(f"{folder}: another process is at work in this folder") from None
    except OSError:  # some network disks have none
        pass
    try:
        yield
    finally:
        close()


def disk_is_full(error: OSError) -> bool:
    """Whether it is for want of room: disk, quota or largest size of a file."""
    return error.errno in _FULL


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that a killed process left in a folder; no other process may be writing there."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, replacing what is there; a reader sees the old file or the new one, never a part.

    Raises DiffoError if the folder cannot be written: missing, no permission, no room.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary file's path beside `path`; rename it over `path` if the block succeeds.

    The temporary name is hidden, ends in `.tmp` and is unique, so that several processes may write the same path (the
    last one wins). The file exists already, which shows a folder that cannot be written before work is done in the
    block. On any error, an interrupt included, it is removed and `path` keeps its old content. A symbolic link at
    `path` stays one: the file that it names is replaced.

    Raises DiffoError, naming the folder, if it is missing, full or cannot be written, and if `path` is a folder or a
    device. The block's own errors pass unchanged, except those of the disk and of the temporary file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "not an ordinary file"
        raise DiffoError(f"cannot write {path}: it is {kind}")
    # Only the start of the name: a name of the greatest length would leave no room for the rest.
    temporary = target.parent / f".{target.name[:40]}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        if os.name == "posix":
            # The rename itself must survive a power cut; only POSIX can sync a folder.
            _sync(target.parent)
    except OSError as error:
        if error.errno in _DISK_ERRORS or error.filename in (temporary, str(temporary)):
            raise _write_error(path, target.parent, error) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(path: str | os.PathLike[str], folder: Path, error: OSError) -> DiffoError:
    if not folder.is_dir():
        return DiffoError(f"cannot write {path}: there is no folder {folder}")
    return DiffoError(f"cannot write {path} in the folder {folder}: {error.strerror or error}")
