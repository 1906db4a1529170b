"""The steps from a picture to its file and back, and their row of the table."""

import argparse
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

import torch
from torch import Tensor

from coding import budget, ledger
from coding.earlier import Earlier
from coding.plan import STREAM, Job
from coding.report import Row
from coding.weights import Weights, read_bytes
from measuring.evaluator import Evaluator
from measuring.metrics import colour_shift, ms_ssim, psnr
from measuring.scores import SCORES
from models.bitstream import WHOLE, CodedPicture, scaled, unpack
from models.codec import Codec
from models.records import Analysed, Contents, Sampling
from models.sizes.memory import Way
from utils.errors import PictureError, out_of_memory
from utils.files import atomic_write, make_folder
from utils.images import read_image, resized, write_image
from utils.limits import MIN_SIDE
from utils.memory import freed_memory_returned

SIDE_BY_SIDE = 1 << 29  # bytes of feature maps, in each lane, up to which the lanes' networks run at the same time
KEEPS_UP_TO = 1 << 32  # bytes of feature maps up to which freed memory stays, which may add half as much again
KEEPS_PIXELS = 1 << 25  # and pixels: beyond, what stays would add as much again, for a fifth of the time or less


@dataclass(eq=False)
class Item:
    """One input on its way, and what has been made of it so far.

    Attributes:
        image, original: uint8 (3, H, W), to be coded, to be compared with. scale: sixteenths of its sides that the image is
            coded at. signals: as `Codec.signals` gives them.
        data: the file. contents, file, codec: what is in it, and who reads it. decoded: uint8 (3, H, W).
        error: what ended it.
    """

    job: Job
    row: Row = field(default_factory=dict)
    image: Tensor | None = None
    original: Tensor | None = None
    scale: int = WHOLE
    signals: tuple | None = None
    data: bytes | None = None
    file: CodedPicture | None = None
    contents: Contents | None = None
    codec: Codec | None = None
    decoded: Tensor | None = None
    error: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width; none where it could not be read."""
        if self.file:
            return self.file.height, self.file.width
        return tuple(self.image.shape[1:]) if self.image is not None else (0, 0)

    @property
    def coded_size(self) -> tuple[int, int]:
        """Height and width that the networks see."""
        if self.file:
            return self.file.coded_size
        return tuple(scaled(side, self.scale) for side in self.size)


def alike(codec: Codec, item: Item) -> Hashable:
    """What pictures that go through the networks at once have in common; one that is coded in tiles goes alone."""
    return (codec, item.coded_size) if codec.tiles(*item.coded_size).small else id(item)


class Steps:
    """What is done to items, one or, where a step takes several, pictures of one coded size and codec.

    On the CPU the networks of small pictures run side by side with those of other threads; those of large ones, and all
    on CUDA, take turns.

    Args:
        folder: that outputs are named from in the table.
        earlier: what to go on from.
    Raises:
        DiffoError: weights or scores that are not there.
    """

    def __init__(
        self, args: argparse.Namespace, folder: Path, weights: Weights, evaluator: Evaluator, earlier: Earlier
    ):
        self.args, self.folder, self.weights = args, folder, weights
        self.evaluator, self.earlier = evaluator, earlier
        self.encodes, self.decodes = earlier.encodes, earlier.decodes
        self.device, self.threads = weights.device, torch.get_num_threads()
        self.scale = round(WHOLE * (args.scale or 1))  # before a budget chooses
        self._turn = RLock()

    def read(self, item: Item) -> None:
        """The input, and with --skip_existing what an earlier run has made of it."""
        args, job = self.args, item.job
        stream = self.earlier.stream(job) if args.skip_existing else None
        item.data = stream if self.encodes else read_bytes(job.source, args.max_pixels)
        if self.encodes and (self.decodes or item.data is None):
            item.image = read_image(job.source, args.max_pixels)
            item.scale = self.scale
        item.original = read_image(job.reference, args.max_pixels) if job.reference else item.image
        if item.image is not None:
            require_comparable(item)
        if item.data is not None:
            self.parse(item)
            if args.skip_existing and self.earlier.picture(job):
                item.decoded = read_image(job.output(".png"), args.max_pixels)
        if stream or item.decoded is not None:
            item.row = (self.earlier.row(job) or {}) | item.row

    def encode(self, *items: Item) -> None:
        """The encoder's networks."""
        codec = self.weights.codec()

        def work() -> tuple:
            return codec.signals(torch.stack([resized(item.image, *item.coded_size) for item in items]))

        signals, seconds = self._by_networks(codec, items, "encode", work)
        for i, item in enumerate(items):
            item.signals = tuple(None if each is None else each[i : i + 1] for each in signals)
            item.row["encode_s"] = seconds

    def write(self, item: Item) -> None:
        """Entropy coding, and the file."""
        codec = self.weights.codec()
        analysed, base = self._timed(lambda: codec.analysed(*item.size, item.scale, *item.signals))

        def analyse(scale: int) -> Analysed:
            if scale == item.scale:
                return analysed
            with self._turn_for(codec, [item], "encode"):
                return codec.analyse(item.image, scale)

        with self._alone() if self.device.type == "cuda" else nullcontext():  # a residual has networks of its own
            fitted, seconds = self._timed(lambda: self._fitted(codec, item.size, analyse))
        self._place(item.job, STREAM, lambda path: atomic_write(path, fitted.data))
        item.data = fitted.data
        item.row |= {"encode_s": item.row["encode_s"] + base + seconds, "write_s": seconds, "note": fitted.note}

    def parse(self, item: Item) -> None:
        """What is in the file: its ledger and, where a picture is made of it, its integers; their ideal cost beside scores."""
        args = self.args
        item.file = file = unpack(item.data, args.preview)
        require_comparable(item)
        item.codec = self.weights.codec(file.fingerprint)
        item.codec.require_allowed(*item.size)
        output = item.job.output(STREAM if self.encodes else ".png").relative_to(self.folder)
        item.row = {"picture": item.job.name, "output": str(output)} | item.row
        item.row |= ledger.ledger(file)
        if self.decodes:
            item.contents, item.row["read_s"] = self._timed(lambda: item.codec.read(item.data, args.preview))
        # It takes as long as decoding the integers: where time counts, it is left out.
        if item.original is not None and item.contents:
            item.row |= ledger.beside(item.codec, item.contents)

    def render(self, *items: Item) -> None:
        """The decoder's networks."""
        args, codec = self.args, items[0].codec
        steps = None if args.one_step else args.infer_steps
        sampling = Sampling(steps, not args.ancestral, args.eta, args.seed, args.texture)
        contents = [item.contents for item in items]
        pictures, seconds = self._by_networks(codec, items, "decode", lambda: codec.render_all(contents, sampling))
        for item, decoded in zip(items, pictures, strict=True):
            item.decoded = decoded.image
            item.row |= {"eta": decoded.eta, "steps": steps or 1, "decode_s": item.row["read_s"] + seconds}
            item.row |= {"note": "preview: the base alone"} if args.preview else {}

    def save(self, item: Item) -> None:
        self._place(item.job, ".png", lambda path: write_image(path, item.decoded))

    def score(self, item: Item) -> None:
        """What the decoded picture scores beside the original, where there is one."""
        if item.original is None:
            return
        pair = item.original, item.decoded
        add_scores(item.row, {"psnr": psnr(*pair), "ms_ssim": ms_ssim(*pair)})
        item.row |= zip(("error_r", "error_g", "error_b"), colour_shift(*pair), strict=True)
        if self.evaluator.names:
            with self._alone():  # networks larger than the codec's, of libraries that are loaded when first needed
                add_scores(item.row, self.evaluator(*pair))

    # What the steps need --------------------------------------------------------------------------------------------

    def _place(self, job: Job, suffix: str, write: Callable[[Path], None]) -> None:
        """Write an output into its folder, which is made now, so that inputs that fail leave none."""
        make_folder(job.target.parent)
        write(job.output(suffix))

    def _fitted(self, codec: Codec, size: tuple[int, int], analyse: Callable[[int], Analysed]) -> budget.Fitted:
        """The file of the quality or the budget that was asked for."""
        args, max_bytes = self.args, self.args.max_bytes
        if args.target_bpp:
            max_bytes = budget.bytes_of_bpp(args.target_bpp, *size)
        if max_bytes and args.scale is None:
            return budget.fit_scaled(codec, max_bytes, analyse)
        if max_bytes:
            return budget.fit(codec, analyse(self.scale), max_bytes)
        code = codec.level_code(args.quality)
        return budget.Fitted(codec.write(analyse(self.scale), code), code)

    def _by_networks(self, codec: Codec, items: Sequence[Item], way: Way, work: Callable):
        """The result of work(), in turn with other lanes where the networks need it, and seconds for each item."""
        with self._turn_for(codec, items, way):
            result, seconds = self._timed(work)
        return result, seconds / len(items)

    @contextmanager
    def _turn_for(self, codec: Codec, items: Sequence[Item], way: Way) -> Iterator[None]:
        """Around networks: no other lane's inside it where they are large, or on CUDA."""
        size = items[0].coded_size
        maps = len(items) * (codec.memory(*size, way) - codec.memory(MIN_SIDE, MIN_SIDE, way))
        turn = self._alone() if self.device.type == "cuda" or maps > SIDE_BY_SIDE else nullcontext()
        large = maps > KEEPS_UP_TO or math.prod(size) > KEEPS_PIXELS
        with turn, freed_memory_returned() if self.weights.keeps_memory and large else nullcontext():
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other lane's networks inside it, and all threads of the processor."""
        with self._turn:
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                yield
            finally:
                torch.set_num_threads(before)

    def _timed(self, work: Callable):
        """The result of work() and its seconds. Raises PictureError where memory does not suffice."""
        sync = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        sync()
        began = time.perf_counter()
        try:
            result = work()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise PictureError(f"not enough memory on {self.device} for a picture of this size") from error
        sync()
        return result, time.perf_counter() - began


def require_comparable(item: Item) -> None:
    """Raise PictureError if the original has another size than the item."""
    if item.original is not None and item.original.shape[1:] != item.size:
        (height, width), (_, rows, columns) = item.size, item.original.shape
        name = item.job.reference or item.job.source
        raise PictureError(f"{name}: {columns}x{rows} cannot be compared with {width}x{height}")


def add_scores(row: Row, scores: dict[str, float | None]) -> None:
    """Scores for a row, whose note gets the reason where its picture is too small for one."""
    small = [SCORES[name] for name, value in scores.items() if value is None and name not in row]
    reasons = [f"{score.heading} needs sides from {score.min_side} pixels" for score in small]
    row |= scores | {"note": "; ".join(filter(None, [row.get("note"), *reasons])) or None}
