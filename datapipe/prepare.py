"""Prepare pictures for training and measuring.

python -m datapipe.prepare list pictures/ -o train.txt          text list of the pictures in folders
python -m datapipe.prepare shards pictures/ -o shards/          WebDataset tars, with their indexes
python -m datapipe.prepare index shards/                        indexes of tars that are there
python -m datapipe.prepare download kodak -o data/kodak         or clic2020, div2k: test sets from the web; coco to train
"""

import argparse
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from datapipe.pictures import start_worker
from datapipe.shards import find_shards, write_index, write_shards
from datapipe.sources import read_list
from datapipe.test_sets import CROP, SETS
from utils.commandline import answer, command_parser, positive
from utils.errors import DiffoError, PictureError
from utils.files import PICTURES, atomic_write, made_folder, tell_left_out
from utils.images import find_pictures, read_image

CHECKERS = min(4, os.cpu_count() or 1)  # processes that decode for --check


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, "python -m datapipe.prepare")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(work, name: str, told: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=told, description=told)
        sub.set_defaults(work=work)
        return sub

    for work, name, told, out in (
        (make_list, "list", "write a text list of pictures, one path a line", "TXT"),
        (make_shards, "shards", "pack pictures into WebDataset tar shards and index them", "DIR"),
    ):
        sub = command(work, name, told)
        sub.add_argument("pictures", nargs="+", metavar="PATH", help="folders (sub-folders included) or .txt lists")
        sub.add_argument("-o", "--out", type=Path, required=True, metavar=out)
        sub.add_argument("--check", action="store_true", help="decode every picture and leave unreadable ones out")
    sub.add_argument(
        "--name", default="pictures", type=file_name, help="of the shards: NAME-000000.tar (default: pictures)"
    )
    sub.add_argument("--max_count", type=positive, default=10_000, metavar="N", help="pictures a shard (default 10000)")
    sub.add_argument("--max_mb", type=positive, default=1000, metavar="MB", help="size of a shard (default 1000)")
    sub = command(make_indexes, "index", "index existing WebDataset tar shards, so that training can read them")
    sub.add_argument("shards", nargs="+", metavar="PATH", help="tars, folders of tars, or set-{000..127}.tar")
    sub = command(download, "download", "fetch a set of the literature")
    told = f"clic2020 and div2k: whole pictures and {CROP}x{CROP} crops; coco: 118,287 pictures to train on, 2 x 19 GB"
    sub.add_argument("set", choices=SETS, help=told)
    sub.add_argument("-o", "--out", type=Path, metavar="DIR", help="default: data/kodak and so on")
    return parser.parse_args(argv)


def file_name(text: str) -> str:
    """An argparse type: a name without folders."""
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name without folders")
    return text


def make_list(args: argparse.Namespace) -> None:
    """Paths below the list's folder are written relative to it: list and pictures may move together."""
    base = Path(os.path.realpath(args.out.parent))
    lines = []
    for path in gather(args.pictures, args.check):
        absolute = Path(os.path.abspath(path))
        line = str(absolute.relative_to(base) if absolute.is_relative_to(base) else absolute)
        if line != line.strip() or len(line.splitlines()) != 1:
            raise DiffoError(f"{str(path)!r}: this name cannot stand in a list; rename the file")
        lines.append(line + "\n")
    atomic_write(args.out, "".join(lines).encode())
    print(f"{args.out}: {len(lines)} pictures")


def make_shards(args: argparse.Namespace) -> None:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise DiffoError(f"{args.out}: not an empty folder; name another, or remove it to begin anew")
    paths = gather(args.pictures, args.check)
    foreign = [path for path in paths if path.suffix.lower() not in PICTURES]
    if foreign:
        raise DiffoError(f"{foreign[0]}: no name of a picture, so readers of the shards would not find it")
    shown = tqdm(paths, desc="packing", disable=None)
    with made_folder(args.out):
        write_shards(shown, args.out, args.name, args.max_count, args.max_mb * 10**6)
    print(f"{args.out}: {len(paths)} pictures in {len(find_shards([str(args.out)]))} shards, indexed")


def make_indexes(args: argparse.Namespace) -> None:
    pictures = without = 0
    shards = find_shards(args.shards)
    for tar in tqdm(shards, desc="indexing", disable=None):
        found, others = write_index(tar)
        pictures, without = pictures + found, without + others
    lacking = f"; {without} samples have none and are left out" if without else ""
    print(f"{len(shards)} shards indexed: {pictures} pictures{lacking}")


def download(args: argparse.Namespace) -> None:
    SETS[args.set](args.out or Path("data") / args.set, print)


def gather(places: list[str], check: bool) -> list[Path]:
    """The pictures of folders and lists, in order; with `check`, those that can be read, the others named."""
    paths: list[Path] = []
    others: Counter[str] = Counter()
    for place in places:
        paths += map(Path, read_list(place)) if place.endswith(".txt") else find_pictures(place, others)
    if others:
        print(f"{', '.join(places)}: {len(paths)} pictures{tell_left_out(others)}", file=sys.stderr)
    if check:
        paths = readable(paths)
    if not paths:
        raise DiffoError(f"{', '.join(places)}: no pictures there")
    return paths


def readable(paths: list[Path]) -> list[Path]:
    """Those that can be read; the others are named. Raises DiffoError if a process was killed."""
    pool = ProcessPoolExecutor(CHECKERS, initializer=start_worker, initargs=(0,))
    try:
        found = pool.map(_problem, paths, chunksize=16)
        problems = list(tqdm(found, desc="checking", total=len(paths), disable=None))
    except BrokenProcessPool as error:
        raise DiffoError(
            "--check: a process that reads pictures was killed; mostly memory is short. Without --check, training "
            "replaces pictures that it cannot read"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    for problem in filter(None, problems):
        print(f"left out: {problem}", file=sys.stderr)
    return [path for path, problem in zip(paths, problems, strict=True) if not problem]


def _problem(path: Path) -> str | None:
    try:
        read_image(path)
    except PictureError as error:
        return str(error)
    return None


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return answer(args.work, args)


if __name__ == "__main__":
    sys.exit(main())
