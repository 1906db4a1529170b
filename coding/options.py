"""Options of the command `inference.py`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from models.bitstream import LEAST_SCALE, WHOLE
from models.speed.choices import FAST_PATHS, PRECISIONS
from utils.commandline import command_line, command_parser, number, positive
from utils.limits import MAX_PIXELS

DECODERS = ("full", "light")
SCALES = tuple(n / WHOLE for n in range(LEAST_SCALE, WHOLE + 1))
MODES = ("roundtrip", "compress", "decompress", "inspect")

quality = number(float, lambda value: 0 <= value <= 100, "in 0 to 100")
rate = number(float, lambda value: 0 < value < float("inf"), "a rate above 0")
noise_level = number(float, lambda value: 0 < value <= 1, "in (0, 1]")
tile_side = number(int, lambda value: value >= 256 and value % 64 == 0, "a multiple of 64 pixels, from 256")
scale = number(float, lambda value: value in SCALES, "a multiple of 1/16 from 0.25 to 1, as 0.75 or 0.625")
rate_weight = number(float, lambda value: 0 <= value < float("inf"), "a weight from 0")
texture = number(float, lambda value: 0 <= value <= 2, "in 0 to 2")
noise_seed = number(int, lambda value: 0 <= value < 2**32, "in 0 to 2^32 - 1")


def path(text: str) -> Path:
    """An argparse type. An empty name would be the working folder, and stands mostly for a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return Path(text)


def parse(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """The options; `command` among them is the line that was given, to be pasted into a shell. Wrong usage exits with 2."""
    parser = command_parser(description, "inference.py")
    _add_files(parser)
    _add_coding(parser)
    args = parser.parse_args(argv)
    for wrong, message in _mistakes(args):
        if wrong:
            parser.error(message)
    args.command = command_line("inference.py", argv)
    return args


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-i", "--in_path", type=path, nargs="+", metavar="PATH", help="pictures, .dfo files, or folders of them")
    add(
        "-o",
        "--out_path",
        type=path,
        metavar="PATH",
        help="folder for <stem>.dfo, <stem>.png, metrics.csv; or one file",
    )
    add("-r", "--ref_path", type=path, metavar="PATH", help="originals to measure against, paired by file name")
    add("--mode", choices=MODES, default="roundtrip", help="default: roundtrip, which decodes the file it has written")
    add("--demo", action="store_true", help="code the photographs that scikit-image ships, instead of -i")
    add("--recursive", action="store_true", help="look into sub-folders of -i")
    add("--overwrite", action="store_true", help="replace outputs that are there already")
    add("--skip_existing", action="store_true", help="leave outputs that are there, whole, and do the rest")
    add("--metrics", nargs="+", default=[], metavar="NAME", help="more scores: stlpips-vgg fsim nlpd lpips-vgg ...")
    add("--overview", action="store_true", help="draw overview.png: originals beside decoded pictures")
    add("--json", action="store_true", help="inspect: one JSON object per line")
    add = parser.add_argument_group("weights (without these flags: the small ones that ship)").add_argument
    add("--weights", type=path, metavar="DIR", help="release folder, made by python -m release")
    add("--ckpt", type=path, metavar="FILE", help="UNet, ema_model_<it>.pth")
    add("--vqckpt", type=path, metavar="FILE", help="VQ base, vq_model_<it>.pth.tar")
    add("--GT_vqckpt", type=path, metavar="FILE", help="image autoencoder, GT_vq_model_<it>.pth.tar")
    add("--config", type=path, metavar="YAML", help="sizes of the networks, where the files lack them")


def _add_coding(parser: argparse.ArgumentParser) -> None:
    size = parser.add_argument_group("rate (without these flags: the base alone)").add_mutually_exclusive_group()
    add = size.add_argument
    add("--quality", type=quality, default=0.0, metavar="Q", help="0, the base alone, to 100; any number between")
    add("--target_bpp", type=rate, metavar="B", help="the largest file of at most B bits per pixel")
    add("--max_bytes", type=positive, metavar="N", help="the largest file of at most N bytes")
    told = (
        "weight of their bits when indices of the base are chosen, in shares of the code book's spacing "
        "(default: 0.0625; 0: the nearest codes, as with weights that have no index model)"
    )
    parser.add_argument("--rdo", type=rate_weight, metavar="W", help=told)
    told = "share of both sides that is coded, for the decoder to enlarge (default: 1; with a budget, what suits it)"
    parser.add_argument("--scale", type=scale, metavar="S", help=told)
    add = parser.add_argument_group("denoising").add_argument
    add("--one_step", action="store_true", help="a single step, noise level from the rate (the default)")
    add("--ddim", action="store_true", help="deterministic steps (the default)")
    add("--infer_steps", type=positive, metavar="N", help="N of the schedule's steps, the least noisy one among them")
    add("--ancestral", action="store_true", help="with --infer_steps: draw fresh noise at every step")
    add("--steps", type=int, metavar="T", help="steps of the schedule that the weights were trained with")
    add("--eta", type=noise_level, metavar="ETA", help="noise level of the single step, instead of the rate's")
    add("--seed", type=noise_seed, metavar="N", help="noise seed, instead of the file's own")
    add(
        "--texture",
        type=texture,
        default=1.0,
        metavar="X",
        help="share of texture that is added, 0 to 2 (default 1), by weights that add some",
    )
    add("--decoder", choices=DECODERS, default="full", help="full: D (the default); light: the release's light decoder")
    add = parser.add_argument
    add("--preview", action="store_true", help="the base alone, also of a file that was cut after it")
    add("--max_pixels", type=positive, default=MAX_PIXELS, metavar="N", help="refuse files that claim more pixels")
    told = "side of the tiles that large pictures are coded in (default %(default)s)"
    add("--chop_size", type=tile_side, default=1024, metavar="PX", help=told)
    told = "so many pictures of one size at once (default: by their size; 1: one picture after the other)"
    add("--batch", type=positive, metavar="N", help=told)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    told = "of the networks; auto (the default): bfloat16 where the hardware computes in it and it pays, else float32"
    add("--precision", choices=PRECISIONS, default="auto", help=told)
    fast_paths(add)


def fast_paths(add: Callable) -> None:
    told = "fast paths to leave out: fused_norm, graphs (CUDA), keep_memory (CPU: freed memory stays with the process)"
    add("--without", nargs="+", choices=FAST_PATHS, default=(), metavar="NAME", help=told)


def _mistakes(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Every way to contradict oneself: whether it was done, and what to say then."""
    mode, triple = args.mode, [args.ckpt, args.vqckpt, args.GT_vqckpt]
    encodes, decodes = mode in ("roundtrip", "compress"), mode in ("roundtrip", "decompress")
    compares = bool(args.metrics or args.overview)
    sized = args.quality or args.target_bpp or args.max_bytes
    nothing = f"--mode {mode} decodes nothing: leave out --ref_path, --metrics and --overview"
    levels = "--eta is for the single step; the schedule's steps have levels of their own: leave out --infer_steps"
    originals = "--metrics and --overview compare with originals: name them with --ref_path"
    return [
        (bool(args.in_path) == args.demo, "name the input with -i PATH, or use --demo"),
        (args.demo and not encodes, "--demo goes with --mode roundtrip or compress"),
        (args.out_path is None and mode != "inspect", f"name the output folder with -o DIR (--mode {mode})"),
        (args.overwrite and args.skip_existing, "--overwrite and --skip_existing contradict each other"),
        (any(triple) and not all(triple), "--ckpt, --vqckpt and --GT_vqckpt belong together: name all three or none"),
        (any(triple) and args.weights, "--weights names a whole release: leave out --ckpt, --vqckpt and --GT_vqckpt"),
        (args.config and not any(triple), "--config goes with --ckpt, --vqckpt and --GT_vqckpt"),
        (args.decoder == "light" and any(triple), "--decoder light is of a whole release: name it with --weights DIR"),
        (args.decoder == "light" and not decodes, f"--mode {mode} decodes nothing: leave out --decoder"),
        (args.one_step and (args.infer_steps or 1) > 1, "--one_step and --infer_steps above 1 contradict each other"),
        (args.ancestral and (args.one_step or args.ddim), "--ancestral contradicts --one_step and --ddim"),
        (args.ancestral and not args.infer_steps, "--ancestral: say how many of the schedule's steps, --infer_steps N"),
        ((args.ref_path or compares) and not decodes, nothing),
        (compares and mode == "decompress" and not args.ref_path, originals),
        (args.json and mode != "inspect", "--json goes with --mode inspect; the other modes write metrics.json"),
        (args.preview and encodes, "--preview goes with --mode decompress or inspect"),
        ((args.scale or 1) != 1 and not encodes, "--scale goes with --mode roundtrip or compress: files have theirs"),
        (args.texture != 1 and not decodes, f"--mode {mode} decodes nothing: leave out --texture"),
        (args.rdo is not None and not encodes, "--rdo goes with --mode roundtrip or compress"),
        (sized and not encodes, "--quality, --target_bpp and --max_bytes go with --mode roundtrip or compress"),
        (args.eta is not None and args.infer_steps and not args.one_step, levels),
    ]
