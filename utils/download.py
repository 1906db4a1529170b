"""Files from the web: complete and checked, or not there."""

import hashlib
import http.client
import os
import ssl
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from utils.errors import DiffoError
from utils.files import make_folder

_NETWORK_ERRORS = (urllib.error.URLError, ssl.SSLError, TimeoutError, ConnectionError, http.client.HTTPException)
_BLOCK = 1 << 20
_PARTIAL, _UNSATISFIABLE = 206, 416  # HTTP


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits. Raises DiffoError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DiffoError(f"{path}: cannot be read ({error.strerror})") from error


def fetch(url: str, path: Path, sha256: str = "", timeout: float = 20.0, resume: bool = False) -> str:
    """Fetch `url` into the file `path`; its SHA-256 in hexadecimal digits.

    The content grows in the hidden file `.<name>.part` beside `path` and takes its name when it is whole and right.

    Args:
        sha256: the digits that the hash must begin with; none: whatever comes is taken.
        timeout: seconds that a connection or a single read may take.
        resume: keep what an interrupted fetch has got, and let the next one go on from there. Needs `sha256`, since
            the file may have changed on the server in between.
    Raises:
        DiffoError: in one line, no connection, an answer other than the file, fewer bytes than announced, another hash,
            a folder that cannot be written.
    """
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.part")
    keep = resume and bool(sha256)
    try:
        if not keep:
            part.unlink(missing_ok=True)
        _receive(url, part, timeout)
        digest = sha256_of(part)
        if not digest.startswith(sha256):
            keep = False
            raise DiffoError(f"{url}: cut short or changed, its SHA-256 does not begin with {sha256}")
        os.replace(part, path)
        return digest
    except urllib.error.HTTPError as error:
        raise DiffoError(f"cannot fetch {url}: the server answers {error.code} {error.reason}") from error
    except _NETWORK_ERRORS as error:
        reason = getattr(error, "reason", None) or error
        again = "The same command goes on from there." if keep and part.exists() else "Is this machine online?"
        raise DiffoError(
            f"cannot fetch {url} ({reason}). {again} The file can also be fetched elsewhere and put into {path.parent}"
        ) from error
    except ValueError as error:
        raise DiffoError(f"cannot fetch {url}: not an address ({error})") from error
    except OSError as error:
        raise DiffoError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if not keep:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _receive(url: str, part: Path, timeout: float) -> None:
    """Append to `part` what it lacks of `url`, or write it anew where the server cannot go on in the middle."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "diffo"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if not start or error.code != _UNSATISFIABLE:
            raise
        part.unlink()  # as long as the file, or longer
        return _receive(url, part, timeout)
    with response:
        if start and not (
            response.status == _PARTIAL and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        ):
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.name[1:-5], disable=None)
        with bar, part.open("ab" if start else "wb") as output:
            while block := response.read(_BLOCK):
                output.write(block)
                bar.update(len(block))
            if total is not None and output.tell() != total:
                raise ConnectionError(f"cut short at {output.tell()} of {total} bytes")
            output.flush()
            os.fsync(output.fileno())
