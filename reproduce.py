"""Reproduce the paper's tables and figures; each goes into results/<command>, and goes on where it was interrupted.

python reproduce.py weights                            fetch the weights of learned scores once, online
python reproduce.py rates --data data/kodak            every score against the rate, beside other codecs (Figs. 6, 8)
python reproduce.py table1 --data data/kodak           BD-rate, parameters, seconds
python reproduce.py table2 --data data/kodak --weights STEPS-1 STEPS-2 ...    releases by number of steps
python reproduce.py branches --data data/kodak --weights RELEASE              base branch, residual branch, both (Fig. 4)
python reproduce.py eta --data VALIDATION --held_out data/kodak               noise level by rate, c fitted (Fig. 5)
python reproduce.py variance --data data/kodak         how much the rate varies from picture to picture (Fig. 9a)
python reproduce.py ablation --data data/kodak --releases FOLDER              finished ablations in one table (Fig. 10)
python reproduce.py ceiling --data data/kodak --fit TRAINING    the image autoencoder alone, beside principal components
python reproduce.py artefacts --data data/kodak        patterns, borders, colour casts and flat areas, by number
python reproduce.py crops --data data/kodak            crops beside other codecs at equal bytes, as one picture
python reproduce.py timing                             milliseconds and operations of every part
python reproduce.py equal_bytes --data data/kodak --against RELEASE           two layers within a base-only file's bytes
python reproduce.py all --data data/kodak              all of these that the inputs allow
python reproduce.py report --data data/kodak           one page of all results: pictures to compare, curves, tables

Several processes share the pictures: torchrun --nproc_per_node=N reproduce.py ...
"""

import argparse
import importlib
import re
import sys
from itertools import chain
from pathlib import Path

from coding.options import DECODERS, fast_paths, quality, rate, rate_weight
from models.speed.choices import PRECISIONS
from utils.commandline import answer, command_line, command_parser, loading, number, positive

QUALITIES = (0.0, 0.4, 20.0, 40.0, 60.0, 80.0, 100.0)
FEW = (0.0, 30.0)  # of crops
METRICS = ("psnr", "psnr_red", "ms_ssim", "stlpips-alex", "lpips-vgg", "dists", "fsim", "nlpd")
CODECS = ("jpeg2000", "webp", "avif", "heic", "jxl")
RESULTS = Path("results")
SIZES = ("512x768", "768x768")
OTHERS, LABELS = ("avif", "heic", "jpeg2000"), ("ms_ssim", "stlpips-alex")  # of crops
STEADY = ("webp", "avif", "heic", "jxl")  # of variance: JPEG 2000's setting is the number of bytes

steps = number(int, lambda value: value >= 2, "2 or more")
side = number(int, lambda value: 16 <= value <= 1024, "a number of pixels from 16 to 1024")
duration = number(float, lambda value: 0 < value < 1e6, "a number of seconds above 0")


def size(text: str) -> str:
    """An argparse type: HEIGHTxWIDTH in pixels."""
    sides = re.fullmatch(r"(\d+)x(\d+)", text)
    if not sides or min(map(int, sides.groups())) < 16:
        raise argparse.ArgumentTypeError(f"{text} is not HEIGHTxWIDTH in pixels, both sides from 16")
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, "reproduce.py")
    commands = parser.add_subparsers(dest="experiment", required=True, metavar="COMMAND")
    weights = commands.add_parser("weights", help="fetch the weights of learned scores")
    weights.add_argument(
        "--timeout", type=duration, default=20.0, metavar="S", help="for a connection (default 20 seconds)"
    )
    for name, (told, groups) in COMMANDS.items():
        command = commands.add_parser(name, help=told)
        for add_options in groups:
            add_options(command.add_argument)
        out = RESULTS if name in ("all", "report") else RESULTS / name
        command.add_argument("-o", "--out_path", type=Path, default=out, metavar="DIR", help=f"default: {out}")
        command.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    if "bpp" in args:
        if args.qualities and args.bpp:
            commands.choices[args.experiment].error("--qualities and --bpp contradict each other")
        args.qualities = args.qualities or (FEW if args.experiment == "crops" else QUALITIES)
    args.command = command_line("reproduce.py", argv)
    return args


def crop(text: str) -> tuple[str, int | None, int | None]:
    """An argparse type: NAME, or NAME@LEFT,TOP in pixels."""
    name, at, place = text.rpartition("@")
    if not at:
        return text, None, None
    found = re.fullmatch(r"(\d+),(\d+)", place)
    if not (name and found):
        raise argparse.ArgumentTypeError(f"{text} is not NAME or NAME@LEFT,TOP in pixels")
    return name, int(found[1]), int(found[2])


def releases(add) -> None:
    add("--weights", type=Path, nargs="+", metavar="DIR", help="release folders (default: the small one that ships)")


def decoders(add) -> None:
    add(
        "--decoder", choices=DECODERS, nargs="+", default=["full"], help="full: D (default); light: shown as NAME-light"
    )


def optimised(add) -> None:
    told = "and each with another weight of the base's bits, as inference.py --rdo W: NAME-rdo-W (0: the nearest codes)"
    add("--rdo", type=rate_weight, metavar="W", help=told)


def pictures(add) -> None:
    add("--data", type=Path, required=True, metavar="DIR", help="pictures, for instance Kodak")
    add("--limit", type=positive, metavar="N", help="at most so many of them, evenly spread")


def scores(add) -> None:
    add("--metrics", nargs="+", default=METRICS, metavar="NAME", help="scores (default: " + " ".join(METRICS) + ")")


def one_quality(add) -> None:
    add("--quality", type=quality, default=0.0, metavar="Q", help="0, the base alone (the default), to 100")


def qualities(add) -> None:
    told = " ".join(f"{q:g}" for q in QUALITIES)
    add("--qualities", type=quality, nargs="+", metavar="Q", help=f"default: {told}")
    budgets(add)


def budgets(add) -> None:
    told = "instead of --qualities: the largest files of at most so many bits per pixel, at the scale that suits each"
    add("--bpp", type=rate, nargs="+", default=(), metavar="B", help=told)


def others(add) -> None:
    add("--codecs", nargs="*", default=CODECS, metavar="NAME", help="other codecs (default: " + " ".join(CODECS) + ")")
    by(add)
    add("--anchor", metavar="NAME", help="codec or release that BD-rates are against (default: the first of --codecs)")
    add("--published", metavar="SET", help="draw published points of this set as well, for instance kodak")


def distances(add) -> None:
    told = "between patches of originals and of decoded pictures: kid or fid; or, by networks that a package brings, "
    add(
        "--distances",
        nargs="+",
        default=[],
        metavar="NAME",
        help=told + "kid-stlpips-alex, kid-lite0, and fid- likewise",
    )


def by(add) -> None:
    told = "other codecs: bytes that count against ours, of their whole files (the default) or without containers"
    add("--by", choices=["file", "payload"], default="file", help=told)


def steady(add) -> None:
    told = "other codecs, each at one setting (default: " + " ".join(STEADY) + ")"
    add("--codecs", nargs="*", default=STEADY, metavar="NAME", help=told)


def sweep(add) -> None:
    add("--points", type=steps, default=12, metavar="N", help="noise levels in the sweep (default 12)")
    add("--metric", default="lpips-vgg", metavar="NAME", help="to fit by (default %(default)s)")


def held_out(add) -> None:
    add("--held_out", type=Path, required=True, metavar="DIR", help="photographs to compare on")
    add("--store", type=Path, metavar="DIR", help="write a release with the fitted c, in a new folder")
    add("--weights", type=Path, metavar="DIR", help="release folder (default: the small one that ships)")


def folders(add) -> None:
    add("--releases", type=Path, nargs="+", required=True, metavar="DIR", help="releases, or folders of them")


def reference(add) -> None:
    add("--reference", default="config", metavar="NAME", help="the run that others are compared with (%(default)s)")


def rivals(add) -> None:
    add("--against", type=Path, nargs="+", required=True, metavar="DIR", help="releases that code the base alone")


def fitted(add) -> None:
    add("--fit", type=Path, metavar="DIR", help="training pictures: principal components are fitted to them, and shown")


def beside(add) -> None:
    add(
        "--beside",
        nargs="+",
        default=[],
        metavar="NAME",
        help="other codecs at the first release's bytes, for artefacts",
    )


def clock(add) -> None:
    add("--repeats", type=positive, default=5, metavar="N", help="rounds after one of warm-up (default 5)")
    add("--precision", choices=PRECISIONS, default="auto", help="of the networks (default: auto)")


def timed(add) -> None:
    add("--data", type=Path, metavar="PATH", help="its first picture is timed (default: one of scikit-image)")
    add("--config", type=Path, metavar="YAML", help="time random weights of this configuration's sizes, not releases")


def sizes(add) -> None:
    add("--sizes", type=size, nargs="+", default=SIZES, metavar="HxW", help="default: " + " ".join(SIZES))


def squares(add) -> None:
    told = "pictures, each with the left and top pixel of its crop (default: the middles of three)"
    add("--crops", type=crop, nargs="+", default=[], metavar="NAME[@X,Y]", help=told)
    add("--side", type=side, default=192, metavar="N", help="pixels of a crop's sides (default 192)")


def shown(add) -> None:
    add("--data", type=Path, metavar="DIR", help="pictures, for instance Kodak")
    add("--demo", action="store_true", help="the photographs that scikit-image ships, instead of --data")
    add("--qualities", type=quality, nargs="+", metavar="Q", help="default: " + " ".join(f"{q:g}" for q in FEW))
    budgets(add)
    add("--codecs", nargs="*", default=OTHERS, metavar="NAME", help="other codecs (default: " + " ".join(OTHERS) + ")")
    add("--metrics", nargs="*", default=LABELS, metavar="NAME", help="default: " + " ".join(LABELS))
    by(add)


def everything(add) -> None:
    add("--held_out", type=Path, metavar="DIR", help="for eta: photographs to compare on, --data being fitted on")
    add("--against", type=Path, nargs="+", metavar="DIR", help="for equal_bytes: releases that code the base alone")
    add("--releases", type=Path, nargs="+", metavar="DIR", help="for table2 and ablation: releases, or folders of them")


def page(add) -> None:
    add("--data", type=Path, metavar="DIR", help="the originals of the pictures that rates coded")
    add("--demo", action="store_true", help="code the photographs that scikit-image ships, instead of --data")
    add("--limit", type=positive, metavar="N", help="at most so many pictures on it (default 24)")


COMMANDS = {
    "rates": (
        "scores against the rate (Figs. 6, 8)",
        [releases, decoders, optimised, pictures, scores, qualities, others, distances],
    ),
    "table1": (
        "BD-rate, parameters, seconds",
        [releases, decoders, pictures, scores, qualities, others, distances, one_quality, clock, fast_paths],
    ),
    "table2": ("releases by number of steps", [releases, pictures, scores, one_quality]),
    "branches": ("base branch, residual branch, both (Fig. 4)", [releases, pictures, scores, one_quality]),
    "eta": ("noise level by rate (Fig. 5)", [pictures, held_out, sweep]),
    "variance": ("variation of the rate over pictures (Fig. 9a)", [releases, pictures, one_quality, steady]),
    "ablation": ("finished ablations (Fig. 10)", [folders, reference, pictures, scores, one_quality, distances]),
    "ceiling": ("the image autoencoder alone, D(E(X))", [releases, decoders, pictures, scores, fitted]),
    "artefacts": (
        "patterns, borders, colour casts, flat areas",
        [releases, decoders, pictures, scores, qualities, beside],
    ),
    "crops": ("crops beside other codecs", [releases, decoders, shown, squares]),
    "timing": ("time and operations of every part", [releases, decoders, timed, sizes, one_quality, clock, fast_paths]),
    "equal_bytes": ("two layers within base-only bytes", [releases, pictures, scores, rivals]),
}
OWN = (held_out, steady, folders, rivals, timed, shown)  # of one command: what `all` needs of them is in `everything`
SHARED = [each for each in dict.fromkeys(chain(*(groups for _, groups in COMMANDS.values()))) if each not in OWN]
COMMANDS["all"] = ("all of these that the inputs allow", [*SHARED, everything])
COMMANDS["report"] = ("one page of all results", [page])


def run(args: argparse.Namespace) -> None:
    if args.experiment == "weights":
        from measuring.weights import download_weights

        return download_weights(args.timeout)
    with loading():  # torch takes seconds: wrong usage is answered before
        from utils.distributed import local_device, process_group

        experiment = importlib.import_module(f"experiments.{args.experiment}")
    with process_group(local_device(args.device)):
        experiment.run(args)


def main(argv: list[str] | None = None) -> int:
    return answer(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
