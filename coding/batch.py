"""All inputs of one invocation of `inference.py`, one after the other: one that fails does not stop the rest."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from coding import report
from coding.plan import STREAM, Job, inputs, names_a_file, plan
from coding.table import Table
from utils.commandline import loading
from utils.errors import DiffoError
from utils.files import made_folder, require_writable

TABLE = "metrics"
TABLES = [f"{TABLE}.csv", f"{TABLE}.json"]
WRITTEN = {"roundtrip": [STREAM, ".png"], "compress": [STREAM], "decompress": [".png"]}


def run(args: argparse.Namespace) -> int:
    """Do what the options of `coding.options` say; the exit status is 1 where an input could not be done.

    Raises:
        DiffoError: nothing can be done; before any work, and nothing was written.
    """
    if args.mode == "inspect":
        return _each(plan(_inputs(args), None, None, [], []), _inspection(args), args)
    files, suffixes = _inputs(args), WRITTEN[args.mode]
    alone = names_a_file(args.out_path, suffixes, len(files))
    if alone and args.overview:
        raise DiffoError(f"{args.out_path}: one file; --overview needs a folder, name one with -o DIR")
    folder, tables = (args.out_path.parent, []) if alone else (args.out_path, TABLES)
    sheet = ["overview.png"] if args.overview else []
    jobs = plan(files, args.out_path, args.ref_path, suffixes, [*tables, *sheet], {} if alone else _known(folder))
    written = [job.output(suffix) for job in jobs for suffix in suffixes]
    _require_free(written + [folder / name for name in sheet], args)
    with made_folder(folder):
        require_writable(folder)
    with loading():
        from coding.run import Run  # torch takes seconds: wrong usage is answered before
    with made_folder(folder):
        work = Run(args, folder)
        with nullcontext() if alone else Table(folder, TABLE, work.about) as work.table:
            status = _each(jobs, work.job, args)
            work.extra_metrics()
            if sheet and work.pairs:
                work.overview()
    if work.rows:
        print(report.aligned_table([*work.rows, report.mean_row(work.rows)] if len(work.rows) > 1 else work.rows))
        print(_where(work.done, suffixes, folder, [*tables, *sheet]))
    return status


def _known(folder: Path) -> dict[str, str]:
    """Output of every input in the table of a folder."""
    with Table(folder, TABLE, dict, writes=False) as table:
        return {row["picture"]: row["output"] for row in table.rows if "output" in row}


def _require_free(written: list[Path], args: argparse.Namespace) -> None:
    """Raise DiffoError for outputs that are there, with --overwrite for pictures that are somebody else's.

    Such a picture is replaced only where it is named itself, with -o.
    """
    there = [path for path in written if path.exists()]
    pictures = [path for path in there if path.suffix == ".png" and path != args.out_path]
    if pictures:
        with loading():
            from utils.images import is_ours
        for path in pictures:
            if not is_ours(path):
                raise DiffoError(f"{path}: is there, and no picture of this codec's: it stays; choose another -o")
    if there and not args.overwrite:
        raise DiffoError(f"{there[0]} is there already ({len(there)} such outputs); --overwrite replaces them")


def _where(jobs: list[Job], suffixes: list[str], folder: Path, tables: list[str]) -> str:
    """One line that says where the outputs of these jobs are."""
    if len(jobs) == 1:
        names = [str(jobs[0].output(suffix).relative_to(folder)) for suffix in suffixes]
    else:
        names = [f"{len(jobs)} {suffix}" for suffix in suffixes]
    return f"written to {folder}{os.sep}: {', '.join([*names, *tables])}"


def _inputs(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    if not args.demo:
        return inputs(args.in_path, args.mode in ("decompress", "inspect"), args.recursive)
    with loading():
        from datapipe.sources import demo_photographs
    return [(path, Path(path.name)) for path in demo_photographs()]


def _each(jobs: list[Job], work: Callable[[Job], None], args: argparse.Namespace) -> int:
    """The exit status after every job was tried; errors are printed with the input's path."""
    failed = 0
    for job in tqdm(jobs, desc=args.mode, unit="picture", disable=len(jobs) < 2 or args.mode == "inspect"):
        try:
            with made_folder(job.target.parent) if job.target else nullcontext():
                work(job)
        except DiffoError as error:
            failed += 1
            told = str(error) if str(job.source) in str(error) else f"{job.source}: {error}"
            tqdm.write(f"error: {told}", file=sys.stderr)
    if failed and len(jobs) > 1:
        print(f"error: {failed} of {len(jobs)} inputs could not be done", file=sys.stderr)
    return 1 if failed else 0


def _inspection(args: argparse.Namespace) -> Callable[[Job], None]:
    """Prints header, ledger and, where the weights are named or ship, the estimated cost of a file."""
    with loading():
        from coding import ledger
        from coding.run import Weights, read_bytes
        from models.bitstream import VERSION, unpack
        from models.released import release_named
    weights = Weights(args)

    def inspect(job: Job) -> None:
        data = read_bytes(job.source, args.max_pixels)
        file = unpack(data, args.preview)
        release = release_named(file.fingerprint)
        facts = {"file": str(job.source), "version": VERSION} | ledger.ledger(file)
        if release or weights.named:
            codec = weights.codec(file.fingerprint)
            facts |= ledger.beside(codec, codec.read(data, args.preview))
        coded = "range coder, in passes" if file.in_passes else "range coder"
        facts["base_coding"] = "fixed length" if file.fixed_length else coded
        facts |= {"weights": file.fingerprint.hex(), "release": release}
        told = facts | {"release": release or "none of those that ship"}
        lines = [f"{name:22} {value}" for name, value in told.items()]
        print(json.dumps(facts) if args.json else "\n".join([*lines, ""]))

    return inspect
