"""Files from the web: complete and checked, or not there."""

import http.client
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch

from utils.errors import DiffoError
from utils.files import made_folder


def fetch(url: str, path: Path, sha256: str, timeout: float = 20.0) -> None:
    """Fetch `url` into the file `path`, which appears when it is whole and right.

    Args:
        sha256: the hexadecimal digits that the content's SHA-256 must begin with.
        timeout: seconds that a connection or a single read may take.
    Raises:
        DiffoError: in one line, no connection, an answer other than the file, another hash, a folder that cannot be
            written.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        with made_folder(path.parent), tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            temporary = os.path.join(folder, path.name)
            torch.hub.download_url_to_file(url, temporary, sha256, progress=sys.stderr.isatty())
            os.replace(temporary, path)
    except RuntimeError as error:  # the hash
        raise DiffoError(f"{url}: cut short or changed, its SHA-256 does not begin with {sha256}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DiffoError(
            f"cannot fetch {url} ({error}). Is this machine online? The file can also "
            f"be fetched elsewhere and put into {path.parent}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
