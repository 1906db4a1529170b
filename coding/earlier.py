"""What earlier runs have left in an output folder, for --skip_existing."""

import argparse
from collections.abc import Sequence

from coding.plan import STREAM, Job
from coding.report import Row
from coding.table import Table
from coding.weights import read_bytes
from models.bitstream import unpack
from utils.errors import BitstreamError, CheckpointError
from utils.images import is_whole


class Earlier:
    """Outputs and rows that are there already.

    Args:
        scores: names of those that rows must have, besides PSNR, where pictures are compared.
        fingerprint: of the weights that files must be of; None where each file names its own.
    Attributes:
        table: has the rows; None where one file is written alone.
    """

    def __init__(self, args: argparse.Namespace, scores: Sequence[str], fingerprint: bytes | None):
        self.max_pixels, self.scores, self.fingerprint = args.max_pixels, scores, fingerprint
        self.encodes, self.decodes = args.mode != "decompress", args.mode != "compress"
        self.table: Table | None = None

    def row(self, job: Job) -> Row | None:
        return self.table.get(job.name) if self.table else None

    def stream(self, job: Job) -> bytes | None:
        """The file that was written, if it is whole. Raises CheckpointError if it is of other weights."""
        path = job.output(STREAM)
        if not (self.encodes and path.is_file()):
            return None
        try:
            data = read_bytes(path, self.max_pixels)
            theirs = unpack(data).fingerprint
        except BitstreamError:
            return None
        if theirs != self.fingerprint:
            told = f"{path} is there, of the weights {theirs.hex()}, where these are {self.fingerprint.hex()}"
            raise CheckpointError(f"{told}; choose another -o, or replace it with --overwrite")
        return data

    def picture(self, job: Job) -> bool:
        """Whether the decoded picture is there, whole."""
        return self.decodes and is_whole(job.output(".png"))

    def stands(self, job: Job) -> bool:
        """Whether all that this run would do is done: outputs that are whole, and a row with all scores."""
        compared = self.decodes and (self.encodes or job.reference)
        if self.table:
            row = self.row(job)
            if row is None or (compared and not all(name in row for name in ("psnr", *self.scores))):
                return False
        return (not self.encodes or self.stream(job) is not None) and (not self.decodes or self.picture(job))
