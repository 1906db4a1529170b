"""One invocation of `inference.py`: pictures and files in, files and rows of the table out."""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from coding import budget, ledger, report
from coding.plan import STREAM, Job
from coding.table import Table
from measuring.charts import contact_sheet
from measuring.evaluator import Evaluator
from measuring.metrics import colour_shift, ms_ssim, psnr
from measuring.scores import SCORES
from models.bitstream import unpack
from models.codec import Codec
from models.fast import precision_of, prepare
from models.records import Analysed, Sampling
from models.released import SMALL, Triple, load_release, load_triple, release_of
from utils.distributed import local_device
from utils.errors import BitstreamError, DiffoError, PictureError, out_of_memory
from utils.files import atomic_write
from utils.images import read_image, write_image
from utils.memory import keep_freed_memory

LARGEST_BPP = 2  # ten times what the largest files have
MIN_LIMIT = 1 << 20  # bytes; small pictures may take more than that per pixel


class Weights:
    """Codecs by the fingerprint of a file, loaded when first asked for; `fixed`: the same for every input."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, local_device(args.device)
        self.named = bool(args.ckpt or args.weights)
        self.fixed = self.named or args.mode in ("roundtrip", "compress")
        self.codecs: dict[bytes | None, Codec] = {}
        if self.device.type == "cpu":
            keep_freed_memory()

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
            codec = load_release(args.weights or (SMALL if self.fixed else release_of(fingerprint)), self.device)
        trained = codec.params.diffusion.steps
        if args.steps not in (None, trained):
            raise DiffoError(f"--steps {args.steps}: these weights were trained with a schedule of {trained} steps")
        if (args.infer_steps or 1) > trained:
            raise DiffoError(f"--infer_steps {args.infer_steps}: the schedule of these weights has {trained} steps")
        codec.max_pixels = args.max_pixels
        self.codecs[key] = prepare(codec, args.precision)
        return codec


class Run:
    """One invocation: the weights, how to denoise, and what has been measured so far."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.weights = Weights(args)
        self.device = self.weights.device
        self.evaluator = Evaluator(args.metrics, self.device)  # unknown names stop here
        if self.weights.fixed:
            self.weights.codec()  # wrong ones are told before any picture is read
        self.table: Table | None = None  # that rows are added to, if any
        self.rows: list[report.Row] = []
        self.done: list[Job] = []
        self.pairs: list[tuple[Path, Path, report.Row]] = []  # original, decoded

    def job(self, job: Job) -> None:
        """Code and decode one input as the mode says, and add its row.

        Raises:
            DiffoError: this input cannot be done; no file is left half written.
        """
        args = self.args
        output = job.output(".png" if args.mode == "decompress" else STREAM)
        row: report.Row = {"picture": job.name, "output": str(output.relative_to(self.folder))}
        picture = None if args.mode == "decompress" else read_image(job.source, args.max_pixels)
        original = read_image(job.reference, args.max_pixels) if job.reference else picture
        if picture is not None:
            row |= self._encode(job, picture)
        data = read_bytes(job.source if picture is None else job.output(STREAM), args.max_pixels)
        file = unpack(data, args.preview)
        if original is not None and original.shape[1:] != (file.height, file.width):
            theirs, ours = f"{original.shape[2]}x{original.shape[1]}", f"{file.width}x{file.height}"
            raise PictureError(f"{job.reference or job.source}: {theirs} cannot be compared with the decoded {ours}")
        codec = self.weights.codec(file.fingerprint)
        self._fits(codec, job.source, file.height, file.width)
        contents, reading = self._timed(lambda: codec.read(data, args.preview))
        row |= ledger.ledger(file) | ledger.beside(codec, contents)
        if args.mode != "compress":
            steps = None if args.one_step else args.infer_steps
            sampling = Sampling(steps, not args.ancestral, args.eta, args.seed)
            decoded, networks = self._timed(lambda: codec.render(contents, sampling))
            write_image(job.output(".png"), decoded.image)
            row |= {"eta": decoded.eta, "steps": steps or 1, "decode_s": reading + networks, "read_s": reading}
            row |= {"note": "preview: the base alone"} if args.preview else {}
            if original is not None:
                add_scores(row, {"psnr": psnr(original, decoded.image), "ms_ssim": ms_ssim(original, decoded.image)})
                row |= zip(("error_r", "error_g", "error_b"), colour_shift(original, decoded.image), strict=True)
                self.pairs.append((job.reference or job.source, job.output(".png"), row))
        self.rows.append(row)
        self.done.append(job)
        if self.table:
            self.table.add(row)

    def _encode(self, job: Job, picture: Tensor) -> report.Row:
        codec = self.weights.codec()
        self._fits(codec, job.source, *picture.shape[1:])
        analysed, networks = self._timed(lambda: codec.analyse(picture))
        fitted, writing = self._timed(lambda: self._fitted(codec, analysed))
        atomic_write(job.output(STREAM), fitted.data)
        return {"encode_s": networks + writing, "write_s": writing, "note": fitted.note}

    def _fitted(self, codec: Codec, analysed: Analysed) -> budget.Fitted:
        """The file of the quality or the budget that was asked for."""
        args, file = self.args, analysed.file
        if args.target_bpp:
            return budget.fit(codec, analysed, budget.bytes_of_bpp(args.target_bpp, file.height, file.width))
        if args.max_bytes:
            return budget.fit(codec, analysed, args.max_bytes)
        code = codec.level_code(args.quality)
        return budget.Fitted(codec.write(analysed, code), code)

    def _fits(self, codec: Codec, path: Path, height: int, width: int) -> None:
        codec.require_allowed(height, width)
        if max(height, width) > self.args.chop_size:
            gigabytes = codec.memory(height, width) / 2**30
            raise PictureError(
                f"{path}: {width}x{height} is larger than --chop_size {self.args.chop_size}, and pictures are not tiled "
                f"yet; whole, it needs about {gigabytes:.1f} GiB: --chop_size {max(height, width)} codes it so"
            )

    def _timed(self, work):
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

    def extra_metrics(self) -> None:
        """Scores of --metrics, where their weights are here; otherwise one line that says why not."""
        for reason in self.evaluator.left_out.values():
            print(f"skipped: {reason}", file=sys.stderr)
        for original, decoded, row in self.pairs if self.evaluator.names else []:
            add_scores(row, self.evaluator(*self._pair(original, decoded)))

    def overview(self) -> None:
        sheet = []
        for original, decoded, row in self.pairs:
            told = f"{row['bpp']:.4f} bpp, {row['bytes']:,} bytes, {row['psnr']:.2f} dB"
            sheet.append((*self._pair(original, decoded), f"{original.stem}, 24 bpp", told))
        contact_sheet(sheet, self.folder / "overview.png")

    def _pair(self, original: Path, decoded: Path) -> tuple[Tensor, Tensor]:
        """Both pictures again, since those of a whole folder would not fit into memory."""
        return read_image(original, self.args.max_pixels), read_image(decoded, self.args.max_pixels)

    def about(self) -> dict:
        """How the table was made, for whoever finds it later."""
        args = self.args
        sampler = "ancestral" if args.ancestral else "ddim" if args.infer_steps and not args.one_step else "one step"
        return {
            "weights": [codec.fingerprint.hex() for codec in self.weights.codecs.values()],
            "sampler": None if args.mode == "compress" else sampler,
            "device": str(self.device),
            "precision": [precision_of(codec) for codec in self.weights.codecs.values()],
            "threads": torch.get_num_threads(),
            "command": args.command,
        }


def add_scores(row: report.Row, scores: dict[str, float | None]) -> None:
    """Scores for a row, whose note gets the reason where its picture is too small for one."""
    small = [SCORES[name] for name, value in scores.items() if value is None and name not in row]
    reasons = [f"{score.heading} needs sides from {score.min_side} pixels" for score in small]
    row |= scores | {"note": "; ".join(filter(None, [row.get("note"), *reasons])) or None}


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
