"""One invocation of `inference.py`: pictures and files, batch by batch, in several threads; what comes of each."""

import argparse
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from coding.earlier import Earlier
from coding.lanes import in_lanes
from coding.plan import OVERVIEW, Job
from coding.report import Row
from coding.steps import Item, Steps, alike
from coding.weights import Weights
from measuring.charts import contact_sheet
from measuring.evaluator import Evaluator
from models.speed.fast import precision_of
from utils.errors import DiffoError
from utils.images import read_image
from utils.precision import full_precision

BATCH = 16  # pictures that go through the networks at once, at most, unless --batch says so
BATCH_PIXELS = {"cpu": 512 * 512, "cuda": BATCH * 768 * 512}  # of theirs together: larger batches win nothing there
CUDA_LANES = 4
SHEET = 24  # pictures on an overview


class Result(NamedTuple):
    """What came of an input: its row, or the line that says why there is none."""

    job: Job
    row: Row | None
    error: str | None


class Run:
    """The weights, and how to code, decode and measure.

    Several lanes work at the same time, each a thread with a batch of its own, so that one reads, codes or writes while
    another computes; each has its share of the processor's threads, which small pictures use better so than all together.

    Attributes:
        earlier: the table of the run, and what else is there.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.weights = Weights(args)
        self.device = self.weights.device
        self.evaluator = Evaluator(args.metrics, self.device)  # unknown names stop here
        # Wrong weights are told before any picture is read.
        fingerprint = self.weights.codec().fingerprint if self.weights.fixed else None
        self.earlier = Earlier(args, self.evaluator.names, fingerprint)
        self.steps = Steps(args, folder, self.weights, self.evaluator, self.earlier)
        self.lanes = 1

    def each(self, jobs: Sequence[Job], take: Callable[[Result], None], stopped: Callable[[], bool]) -> None:
        """Code and decode all inputs as the mode says, in lanes; arguments as `coding.lanes.in_lanes`."""
        most = 1 if self.args.batch == 1 else CUDA_LANES if self.device.type == "cuda" else self.steps.threads + 1
        self.lanes = max(1, min(most, len(jobs)))
        try:
            with full_precision():  # of the process: lanes would put it back under each other's feet
                in_lanes(self._lane, jobs, self.lanes, take, stopped)
        finally:
            torch.set_num_threads(self.steps.threads)

    def _lane(self, jobs: Iterator[Job]) -> Iterator[Result]:
        """Batch after batch; no error of one picture is another's."""
        steps = self.steps
        torch.set_num_threads(max(1, steps.threads // self.lanes))
        while batch := self._batch(jobs):
            coded = [item for item in batch if item.data is None]
            self._do(steps.encode, coded, lambda item: alike(self.weights.codec(), item))
            self._do(steps.write, coded)
            self._do(steps.parse, coded)
            if steps.decodes:
                rendered = [item for item in batch if item.decoded is None]
                self._do(steps.render, rendered, lambda item: alike(item.codec, item))
                self._do(steps.save, rendered)
                self._do(steps.score, batch)
            for item in batch:
                yield Result(item.job, None if item.error else item.row, item.error)

    def _batch(self, jobs: Iterator[Job]) -> list[Item]:
        """The next inputs, read: as many as go through the networks at once, if their coded sizes are equal."""
        batch: list[Item] = []
        pixels = 0
        for job in jobs:
            batch.append(Item(job))
            self._do(self.steps.read, batch[-1:])
            height, width = batch[-1].coded_size
            pixels += height * width
            full = pixels >= BATCH_PIXELS[self.device.type] and not self.args.batch
            if full or len(batch) == (self.args.batch or BATCH):
                break
        return batch

    def _do(self, step: Callable[..., None], items: Sequence[Item], alike: Callable[[Item], Hashable] = id) -> None:
        """A step for all items that are well, those that are alike at once; where that fails, for each by itself."""
        groups = defaultdict(list)
        for item in items:
            if not item.error:
                groups[alike(item)].append(item)
        for group in groups.values():
            try:
                step(*group)
            except DiffoError as error:
                if len(group) > 1:
                    self._do(step, group)
                else:
                    source = str(group[0].job.source)
                    group[0].error = str(error) if source in str(error) else f"{source}: {error}"

    def overview(self, jobs: Sequence[Job]) -> None:
        """A sheet of the first pictures in the table, drawn from their files."""
        sheet = []
        for job, row in [(job, row) for job in jobs if (row := self.earlier.row(job)) and "psnr" in row][:SHEET]:
            original, decoded = job.reference or job.source, job.output(".png")
            pair = (read_image(path, self.args.max_pixels) for path in (original, decoded))
            told = f"{row['bpp']:.4f} bpp, {row['bytes']:,} bytes, {row['psnr']:.2f} dB"
            sheet.append((*pair, f"{original.stem}, 24 bpp", told))
        if sheet:
            contact_sheet(sheet, self.folder / OVERVIEW)

    def about(self) -> dict:
        """How the table was made, for whoever finds it later."""
        args = self.args
        sampler = "ancestral" if args.ancestral else "ddim" if args.infer_steps and not args.one_step else "one step"
        return {
            "weights": [codec.fingerprint.hex() for codec in self.weights.codecs.values()],
            "sampler": None if args.mode == "compress" else sampler,
            "decoder": None if args.mode == "compress" else args.decoder,
            "device": str(self.device),
            "precision": [precision_of(codec) for codec in self.weights.codecs.values()],
            "threads": self.steps.threads,
            "side_by_side": self.lanes,
            "command": args.command,
        }
