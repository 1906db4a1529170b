"""The weights that an invocation of `inference.py` needs, and files read within its limits."""

import argparse
from pathlib import Path
from threading import Lock

from models.codec import Codec
from models.released import SMALL, Triple, load_release, load_triple, release_of
from models.speed.fast import prepare
from utils.distributed import local_device
from utils.errors import BitstreamError, DiffoError
from utils.memory import keep_freed_memory

LARGEST_BPP = 2  # ten times what the largest files have
MIN_LIMIT = 1 << 20  # bytes; small pictures may take more than that per pixel


class Weights:
    """Codecs by the fingerprint of a file, loaded when first asked for.

    Attributes:
        fixed: they are the same for every input. keeps_memory: freed memory stays with the process.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, local_device(args.device)
        self.named = bool(args.ckpt or args.weights)
        self.fixed = self.named or args.mode in ("roundtrip", "compress")
        self.codecs: dict[bytes | None, Codec] = {}
        self._lock = Lock()
        self.keeps_memory = self.device.type == "cpu" and "keep_memory" not in args.without
        if self.keeps_memory:
            keep_freed_memory()

    def codec(self, fingerprint: bytes | None = None) -> Codec:
        """The weights named on the command line, the small ones that ship, or the release that a file needs.

        Raises:
            CheckpointError: they are not there, or do not fit. DiffoError: they were trained with other --steps.
        """
        key = None if self.fixed else fingerprint
        with self._lock:  # threads ask, and one loads
            if key not in self.codecs:
                self.codecs[key] = self._loaded(fingerprint)
            return self.codecs[key]

    def _loaded(self, fingerprint: bytes | None) -> Codec:
        args = self.args
        if args.ckpt:
            codec = load_triple(Triple(args.ckpt, args.vqckpt, args.GT_vqckpt), args.config, self.device)
        else:
            folder = args.weights or (SMALL if self.fixed else release_of(fingerprint))
            codec = load_release(folder, self.device, args.decoder)
        trained = codec.params.diffusion.steps
        if args.steps not in (None, trained):
            raise DiffoError(f"--steps {args.steps}: these weights were trained with a schedule of {trained} steps")
        if (args.infer_steps or 1) > trained:
            raise DiffoError(f"--infer_steps {args.infer_steps}: the schedule of these weights has {trained} steps")
        codec.max_pixels, codec.tile_side = args.max_pixels, args.chop_size
        if args.rdo is not None:
            codec.choose_by_rate(args.rdo)
        return prepare(codec, args.precision, args.without)


def read_bytes(path: Path, max_pixels: int) -> bytes:
    """The bytes of a `.dfo` file.

    Raises:
        BitstreamError: it cannot be read, or has more bytes than a picture of `max_pixels` pixels could need.
    """
    limit = max(MIN_LIMIT, max_pixels * LARGEST_BPP // 8)
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BitstreamError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > limit:
        raise BitstreamError(f"{path}: more than the {limit:,} bytes that a picture of --max_pixels could need")
    return data
