"""All inputs of one invocation of `inference.py`, one after the other: one that fails does not stop the rest."""

import argparse
import json
import sys
from pathlib import Path

from coding import report
from coding.plan import STREAM, Job, inputs, plan
from utils.errors import DiffoError
from utils.files import make_folder, require_writable

WRITTEN = {"roundtrip": [STREAM, ".png"], "compress": [STREAM], "decompress": [".png"], "inspect": []}


def run(args: argparse.Namespace) -> int:
    """Do what the options of `coding.options` say; the exit status is 1 where an input could not be done.

    Raises:
        DiffoError: nothing can be done; before any work, and nothing was written.
    """
    jobs, tables = _planned(args)
    if args.mode == "inspect":
        return _inspect(jobs, args)
    written = [job.output(suffix) for job in jobs for suffix in WRITTEN[args.mode]]
    there = [path for path in written + [args.out_path / name for name in tables] if path.exists()]
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
        print(report.aligned_table([*work.rows, report.mean_row(work.rows)]))
    if failed and len(jobs) > 1:
        print(f"error: {failed} of {len(jobs)} inputs could not be done", file=sys.stderr)
    return 1 if failed else 0


def _planned(args: argparse.Namespace) -> tuple[list[Job], list[str]]:
    """The jobs, and the names of the files that are written beside their outputs."""
    if args.demo:
        from datapipe.sources import demo_photographs

        files = [(path, Path(path.name)) for path in demo_photographs()]
    else:
        files = inputs(args.in_path, args.mode in ("decompress", "inspect"), args.recursive)
    if args.mode == "inspect":
        return plan(files, None, args.ref_path, [], []), []
    tables = [*report.TABLES, *(["overview.png"] if args.overview else [])]
    return plan(files, args.out_path, args.ref_path, WRITTEN[args.mode], tables), tables


def _inspect(jobs: list[Job], args: argparse.Namespace) -> int:
    """Print header, ledger and, where the weights are named or ship, the estimated cost of every file."""
    from coding import ledger
    from coding.run import read_bytes
    from coding.weights import Weights
    from models.bitstream import VERSION, unpack
    from models.released import release_named

    weights, failed = Weights(args), 0
    for job in jobs:
        try:
            data = read_bytes(job.source, args.max_pixels)
            file = unpack(data, args.preview)
            release = release_named(file.fingerprint)
            facts = {"file": str(job.source), "version": VERSION} | ledger.ledger(file)
            if release or weights.named:
                codec = weights.codec(file.fingerprint)
                facts |= ledger.beside(codec, codec.read(data, args.preview))
        except DiffoError as error:
            failed += 1
            print(f"error: {_with_path(job.source, error)}", file=sys.stderr)
            continue
        facts["base_coding"] = "fixed length" if file.fixed_length else "range coder"
        facts |= {"weights": file.fingerprint.hex(), "release": release}
        if args.json:
            print(json.dumps(facts))
        else:
            print("\n".join(f"{name:22} {value}" for name, value in facts.items()), end="\n\n")
    return 1 if failed else 0


def _with_path(path: Path, error: Exception) -> str:
    return str(error) if str(path) in str(error) else f"{path}: {error}"
