"""Inputs that experiments share: photographs, and the codec that is measured."""

import argparse
from pathlib import Path

from coding.plan import inputs
from models.codec import Codec
from models.released import SMALL, load_release
from utils.distributed import local_device
from utils.files import make_folder, require_writable


def photographs(folder: Path, limit: int | None = None) -> list[Path]:
    """At most `limit` pictures of a folder and those below it, spread evenly over its sorted names.

    Raises:
        DiffoError: the folder has none, or is not there.
    """
    found = [path for path, _ in inputs([folder], streams=False, recursive=True)]
    step = max(1, len(found) // (limit or len(found)))
    return found[::step][:limit]


def codec_of(args: argparse.Namespace) -> Codec:
    """The codec of --weights on --device, once --out_path is there and can be written into.

    Raises:
        DiffoError: one of the three will not do.
    """
    require_writable(make_folder(args.out_path))
    return load_release(args.weights or SMALL, local_device(args.device))
