"""Which weights an invocation codes with: those that were named, the small ones that ship, or what a file needs."""

import argparse

from models.codec import Codec
from models.released import SMALL, Triple, load_codec, load_triple, release_of
from utils.distributed import local_device
from utils.errors import DiffoError


class Weights:
    """Codecs by the fingerprint of a file, loaded when first asked for.

    Attributes:
        device: where they compute.
        fixed: the same weights for every input, whatever it needs.
        codecs: those loaded so far.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, local_device(args.device)
        self.named = bool(args.ckpt or args.weights)
        self.fixed = self.named or args.mode in ("roundtrip", "compress")
        self.codecs: dict[bytes | None, Codec] = {}

    def codec(self, fingerprint: bytes | None = None) -> Codec:
        """The weights named on the command line, the small ones that ship, or the release that a file needs.

        Raises:
            CheckpointError: they are not there, or do not fit. DiffoError: they were trained with other --steps.
        """
        key = None if self.fixed else fingerprint
        if key in self.codecs:
            return self.codecs[key]
        args = self.args
        if args.ckpt:
            codec = load_triple(Triple(args.ckpt, args.vqckpt, args.GT_vqckpt), args.config, self.device)
        else:
            codec = load_codec(args.weights or (SMALL if self.fixed else release_of(fingerprint)), self.device)
        trained = codec.params.diffusion.steps
        if args.steps not in (None, trained):
            raise DiffoError(f"--steps {args.steps}: these weights were trained with a schedule of {trained} steps")
        codec.max_pixels = args.max_pixels
        self.codecs[key] = codec
        return codec
