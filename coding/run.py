"""One invocation of `inference.py`: pictures and files in, files and rows of the table out."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from coding import budget, ledger, report
from coding.plan import Job
from models.bitstream import unpack
from models.codec import Codec
from models.records import Analysed, Sampling
from store.triple import SMALL, Triple, load_codec, load_triple, release_of
from utils.distributed import local_device
from utils.errors import BitstreamError, DiffoError, PictureError
from utils.files import atomic_write, make_folder
from utils.images import read_image, write_image
from utils.metrics import bpp, colour_shift, ms_ssim, psnr, score_with_pyiqa, unavailable
from utils.plots import contact_sheet


class Run:
    """One invocation: the weights, how to denoise, and what has been measured so far."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.unavailable = {name: unavailable(name) for name in args.metrics}  # unknown names stop here
        self.device = local_device(args.device)
        self.codecs: dict[bytes | None, Codec] = {}
        self.fixed = bool(args.ckpt or args.weights) or args.mode != "decompress"  # the same weights for every input
        if self.fixed:
            self.codec(None)
        self.rows: list[report.Row] = []
        self.pairs: list[tuple[Path, Path, report.Row]] = []  # original, decoded

    def codec(self, fingerprint: bytes | None) -> Codec:
        """The weights named on the command line, the small ones that ship, or the release that a file needs."""
        key = None if self.fixed else fingerprint
        if key not in self.codecs:
            args = self.args
            if args.ckpt:
                codec = load_triple(Triple(args.ckpt, args.vqckpt, args.GT_vqckpt), args.config, self.device)
            else:
                folder = args.weights or (SMALL if self.fixed else release_of(fingerprint))
                codec = load_codec(folder, self.device)
            trained = codec.params.diffusion.steps
            if args.steps not in (None, trained):
                raise DiffoError(f"--steps {args.steps}: these weights were trained with a schedule of {trained} steps")
            codec.max_pixels = args.max_pixels
            self.codecs[key] = codec
        return self.codecs[key]

    def sampling(self, codec: Codec) -> Sampling:
        args, trained = self.args, codec.params.diffusion.steps
        steps = None if args.one_step else min(args.infer_steps or trained, trained)
        return Sampling(steps=steps, ddim=args.ddim, eta=args.eta, seed=args.seed)

    def job(self, job: Job) -> None:
        """Code and decode one input as the mode says, and add its row.

        Raises:
            DiffoError: this input cannot be done; no file is left half written.
        """
        make_folder(job.target.parent)
        row: report.Row = {"picture": job.name}
        if self.args.mode == "decompress":
            stream = job.source
        else:
            stream = job.stream
            row |= self._encode(job)
        if self.args.mode != "compress":
            row |= self._decode(stream, job)
        row |= describe(stream, self.codec, self.args.preview)
        original = job.reference or (job.source if self.args.mode == "roundtrip" else None)
        if self.args.mode == "compress":
            original = None
        if original:
            row |= score(original, job.picture)
            self.pairs.append((original, job.picture, row))
        self.rows.append(row)

    def _encode(self, job: Job) -> report.Row:
        image = read_image(job.source)
        codec = self.codec(None)
        height, width = image.shape[1:]
        self._fits(codec, job.source, height, width)
        analysed, networks = self._timed(lambda: codec.analyse(image))
        fitted, writing = self._timed(lambda: self._fitted(codec, analysed))
        atomic_write(job.stream, fitted.data)
        return {"encode_s": networks + writing, "write_s": writing, "note": fitted.note}

    def _fitted(self, codec: Codec, analysed: Analysed) -> budget.Fitted:
        """The file of the quality or the budget that was asked for."""
        args, file = self.args, analysed.file
        if args.target_bpp is not None:
            allowed = budget.bytes_of_bpp(args.target_bpp, file.height, file.width)
            return budget.fit(codec, analysed, allowed, at_most=False)
        if args.max_bytes is not None:
            return budget.fit(codec, analysed, args.max_bytes)
        level = codec.level_code(args.quality)
        return budget.Fitted(codec.write(analysed, level), level)

    def _decode(self, stream: Path, job: Job) -> report.Row:
        data = read_bytes(stream)
        picture = unpack(data, self.args.preview)
        codec = self.codec(picture.fingerprint)
        self._fits(codec, stream, picture.height, picture.width)
        sampling = self.sampling(codec)
        contents, reading = self._timed(lambda: codec.read(data, self.args.preview))
        decoded, networks = self._timed(lambda: codec.render(contents, sampling))
        write_image(job.picture, decoded.image)
        row = {"eta": decoded.eta, "steps": sampling.steps or 1, "decode_s": reading + networks, "read_s": reading}
        return row | ({"note": "preview: the base alone"} if self.args.preview else {})

    def _fits(self, codec: Codec, path: Path, height: int, width: int) -> None:
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
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bfloat16"):
                result = work()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise PictureError(f"not enough memory on {self.device} for a picture of this size") from error
        sync()
        return result, time.perf_counter() - began

    def extra_metrics(self) -> None:
        """Scores of --metrics, where their weights are here; otherwise one line that says why not."""
        for reason in filter(None, self.unavailable.values()):
            print(f"skipped: {reason}", file=sys.stderr)
        names = [name for name, reason in self.unavailable.items() if reason is None]
        if names and self.pairs:
            pictures = ((read_image(original), read_image(decoded)) for original, decoded, _ in self.pairs)
            scores = score_with_pyiqa(names, pictures, self.device)
            for (_, _, row), values in zip(self.pairs, scores, strict=True):
                row |= values

    def overview(self) -> None:
        sheet = [
            (
                read_image(original),
                read_image(decoded),
                f"{original.stem}, 24 bpp",
                f"{row['bpp']:.4f} bpp, {row['bytes']:,} bytes, {row['psnr']:.2f} dB",
            )
            for original, decoded, row in self.pairs
        ]
        if sheet:
            contact_sheet(sheet, self.args.out_path / "overview.png")

    def about(self) -> dict:
        """How the table was made, for whoever finds it later."""
        return {
            "weights": [codec.fingerprint.hex() for codec in self.codecs.values()],
            "sampler": "one step" if self.args.one_step else "ddim" if self.args.ddim else "ancestral",
            "device": str(self.device),
            "precision": self.args.precision,
            "threads": torch.get_num_threads(),
            "command": " ".join(["python", "inference.py", *sys.argv[1:]]),
        }


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BitstreamError(f"{path}: cannot be read ({error.strerror})") from error


def describe(stream: Path, codec_of: Callable[[bytes], Codec] | None = None, preview: bool = False) -> report.Row:
    """Sizes of a file: the ledger, whose bits add up to 8 x its bytes, and with weights the estimate beside it.

    Of a preview, the bytes are those that it was made from: header, base and their checksum.
    """
    data = read_bytes(stream)
    picture = unpack(data, preview)
    bits = ledger.ledger(picture)
    size = sum(bits.values()) // 8
    row = {"width": picture.width, "height": picture.height, "bytes": size}
    row |= {"bpp": bpp(size, picture.height, picture.width), "level": picture.residual.level if picture.residual else 0}
    row |= bits
    if codec_of:
        codec = codec_of(picture.fingerprint)
        row |= ledger.beside(codec, codec.read(data, preview))
    return row


def score(original: Path, decoded: Path) -> report.Row:
    """PSNR, MS-SSIM and mean error per channel of the 8-bit files."""
    a, b = read_image(original), read_image(decoded)
    if a.shape != b.shape:
        sizes = [f"{p.shape[2]}x{p.shape[1]}" for p in (a, b)]
        raise PictureError(f"{original}: {sizes[0]} cannot be compared with the decoded {sizes[1]}")
    shift = dict(zip(("error_r", "error_g", "error_b"), colour_shift(a, b), strict=True))
    return {"psnr": psnr(a, b), "ms_ssim": ms_ssim(a, b)} | shift
