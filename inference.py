"""Code pictures to `.dfo` files and decode them: DiffO's command line.

python inference.py -i photo.jpg -o out --ddim --one_step            code, decode from the file, measure
python inference.py --mode compress -i pictures -o files             pictures -> .dfo
python inference.py --mode compress -i p.png -o files --target_bpp 0.08   the largest file not over a budget
python inference.py --mode decompress -i files -o out --one_step     .dfo -> .png
python inference.py --mode inspect -i files/photo.dfo                header and sizes of a file
"""

import argparse
import json
import sys
from pathlib import Path

from coding import report
from coding.plan import STREAM, Job, inputs, outputs, plan
from utils.commandline import answer, positive
from utils.errors import DiffoError
from utils.files import make_folder, require_writable
from utils.limits import MAX_PIXELS

MODES = ("roundtrip", "compress", "decompress", "inspect")
WRITTEN = {"roundtrip": [STREAM, ".png"], "compress": [STREAM], "decompress": [".png"], "inspect": []}
CHOP_SIZE = 2048


def quality(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to 100")
    return value


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a rate above 0")
    return value


def noise_level(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def noise_seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to 2^32 - 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-i", "--in_path", type=Path, nargs="+", metavar="PATH", help="pictures, .dfo files, or folders of them")
    add("-o", "--out_path", type=Path, metavar="DIR", help="folder for <stem>.dfo, <stem>.png and metrics.csv")
    add("-r", "--ref_path", type=Path, metavar="PATH", help="originals to measure against, paired by file name")
    add("--mode", choices=MODES, default="roundtrip", help="default: roundtrip, which decodes the file it has written")
    add("--demo", action="store_true", help="code the photographs that scikit-image ships, instead of -i")
    weights = parser.add_argument_group("weights (without these flags: the small ones that ship)")
    weights.add_argument("--weights", type=Path, metavar="DIR", help="release folder, made by python -m release")
    weights.add_argument("--ckpt", type=Path, metavar="FILE", help="UNet, ema_model_<it>.pth")
    weights.add_argument("--vqckpt", type=Path, metavar="FILE", help="VQ base, vq_model_<it>.pth.tar")
    weights.add_argument("--GT_vqckpt", type=Path, metavar="FILE", help="image autoencoder, GT_vq_model_<it>.pth.tar")
    weights.add_argument("--config", type=Path, metavar="YAML", help="sizes of the networks, where the files lack them")
    size = parser.add_argument_group("rate (without these flags: the base alone)").add_mutually_exclusive_group()
    size.add_argument(
        "--quality", type=quality, default=0.0, metavar="Q", help="0, the base alone, to 100; any number between"
    )
    size.add_argument("--target_bpp", type=rate, metavar="B", help="the largest file of at most B bits per pixel")
    size.add_argument("--max_bytes", type=positive, metavar="N", help="the largest file of at most N bytes")
    steps = parser.add_argument_group("denoising")
    steps.add_argument("--one_step", action="store_true", help="the codec's single step, noise level from the rate")
    steps.add_argument("--ddim", action="store_true", help="deterministic steps; otherwise ancestral ones")
    steps.add_argument(
        "--steps", type=int, metavar="T", help="steps of the schedule that the weights were trained with"
    )
    steps.add_argument(
        "--infer_steps", type=positive, metavar="N", help="run N of them, from the least noisy one up (default: all)"
    )
    steps.add_argument(
        "--eta", type=noise_level, metavar="ETA", help="noise level of the single step, instead of the rate's"
    )
    steps.add_argument("--seed", type=noise_seed, metavar="N", help="noise seed, instead of the file's own")
    add("--preview", action="store_true", help="the base alone, also of a file that was cut after it")
    add("--max_pixels", type=positive, default=MAX_PIXELS, metavar="N", help="refuse files that claim more pixels")
    add("--scale", type=int, choices=[1], default=1, help="kept for the published command; a codec does not enlarge")
    add(
        "--chop_size",
        type=positive,
        default=CHOP_SIZE,
        metavar="PX",
        help=f"largest side of a picture (default {CHOP_SIZE})",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of the networks")
    add(
        "--metrics",
        nargs="+",
        default=[],
        metavar="NAME",
        help="more scores: fsim nlpd gmsd vsi vif lpips-vgg dists ...",
    )
    add("--overview", action="store_true", help="draw overview.png: originals beside decoded pictures")
    add("--recursive", action="store_true", help="look into sub-folders of -i")
    add("--overwrite", action="store_true", help="replace outputs that are there already")
    add("--json", action="store_true", help="inspect: one JSON object per line")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if bool(args.in_path) == args.demo:
        parser.error("name the input with -i PATH, or use --demo")
    if args.demo and args.mode not in ("roundtrip", "compress"):
        parser.error("--demo goes with --mode roundtrip or compress")
    if args.out_path is None and args.mode != "inspect":
        parser.error(f"name the output folder with -o DIR (--mode {args.mode})")
    flags = [args.ckpt, args.vqckpt, args.GT_vqckpt]
    if any(flags) and not all(flags):
        parser.error("--ckpt, --vqckpt and --GT_vqckpt belong together: name all three or none")
    if any(flags) and args.weights:
        parser.error("--weights names a whole release: leave out --ckpt, --vqckpt and --GT_vqckpt")
    if args.config and not any(flags):
        parser.error("--config goes with --ckpt, --vqckpt and --GT_vqckpt")
    if args.one_step and args.infer_steps not in (None, 1):
        parser.error(f"--one_step and --infer_steps {args.infer_steps} contradict each other")
    if args.mode == "compress" and (args.ref_path or args.metrics or args.overview):
        parser.error("--mode compress decodes nothing: leave out --ref_path, --metrics and --overview")
    if args.mode == "inspect" and (args.ref_path or args.metrics or args.overview):
        parser.error("--mode inspect decodes nothing: leave out --ref_path, --metrics and --overview")
    if args.mode == "decompress" and (args.metrics or args.overview) and not args.ref_path:
        parser.error("--metrics and --overview compare with originals: name them with --ref_path")
    if args.json and args.mode != "inspect":
        parser.error("--json goes with --mode inspect; the other modes write metrics.json")
    if args.preview and args.mode not in ("decompress", "inspect"):
        parser.error("--preview goes with --mode decompress or inspect")
    if (args.quality or args.target_bpp or args.max_bytes) and args.mode not in ("roundtrip", "compress"):
        parser.error("--quality, --target_bpp and --max_bytes go with --mode roundtrip or compress")
    if args.eta is not None and not args.one_step:
        parser.error("--eta is the noise level of --one_step; the schedule's steps have their own")
    return args


def inspect(jobs: list[Job], args: argparse.Namespace) -> int:
    """Print header, ledger and, where the weights are named or ship, the estimated cost of every file."""
    from coding.run import describe, read_bytes
    from coding.weights import Weights
    from models.bitstream import VERSION, unpack
    from models.released import release_named

    weights, failed = Weights(args), 0
    for job in jobs:
        try:
            data = read_bytes(job.source, args.max_pixels)
            picture = unpack(data, args.preview)
            release = release_named(picture.fingerprint)
            sizes = describe(data, weights.codec if release or weights.named else None, args.preview)
        except DiffoError as error:
            failed += 1
            print(f"error: {_with_path(job.source, error)}", file=sys.stderr)
            continue
        facts = {"file": str(job.source), "version": VERSION} | sizes
        facts["base_coding"] = "fixed length" if picture.fixed_length else "range coder"
        facts["weights"] = picture.fingerprint.hex()
        facts["release"] = release
        if args.json:
            print(json.dumps(facts))
        else:
            print("\n".join(f"{name:22} {value}" for name, value in facts.items()), end="\n\n")
    return 1 if failed else 0


def _with_path(path: Path, error: Exception) -> str:
    return str(error) if str(path) in str(error) else f"{path}: {error}"


def run(args: argparse.Namespace) -> int:
    streams = args.mode in ("decompress", "inspect")
    if args.demo:
        from datapipe.sources import demo_photographs

        files = [(path, Path(path.name)) for path in demo_photographs()]
    else:
        files = inputs(args.in_path, streams, args.recursive)
    written = WRITTEN[args.mode]
    tables = [*report.TABLES, *(["overview.png"] if args.overview else [])] if written else []
    jobs = plan(files, args.out_path if written else None, args.ref_path, written, tables)
    if args.mode == "inspect":
        return inspect(jobs, args)
    there = [path for job in jobs for path in outputs(job, written) if path.exists()]
    there += [args.out_path / name for name in tables if (args.out_path / name).exists()]
    if there and not args.overwrite:
        raise DiffoError(f"{there[0]} is there already ({len(there)} such outputs); --overwrite replaces them")
    require_writable(make_folder(args.out_path))
    from tqdm import tqdm

    from coding.run import Run  # torch takes seconds: wrong usage is answered before

    work = Run(args)
    failed = 0
    for job in tqdm(jobs, desc=args.mode, unit="picture", disable=len(jobs) < 2):
        try:
            work.job(job)
        except DiffoError as error:
            failed += 1
            tqdm.write(f"error: {_with_path(job.source, error)}", file=sys.stderr)
    if work.rows:
        report.write_tables(work.rows, args.out_path, work.about())  # before metrics that may take long
        work.extra_metrics()
        report.write_tables(work.rows, args.out_path, work.about())
        if args.overview and work.pairs:
            work.overview()
        print(report.text_table(work.rows))
    if failed and len(jobs) > 1:
        print(f"error: {failed} of {len(jobs)} inputs could not be done", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    return answer(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
