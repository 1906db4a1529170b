"""All inputs of one invocation of `inference.py`, one after the other: one that fails does not stop the rest."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from coding import report
from coding.plan import STREAM, Job, inputs, plan
from utils.errors import DiffoError
from utils.files import make_folder, require_writable

WRITTEN = {"roundtrip": [STREAM, ".png"], "compress": [STREAM], "decompress": [".png"]}


def run(args: argparse.Namespace) -> int:
    """Do what the options of `coding.options` say; the exit status is 1 where an input could not be done.

    Raises:
        DiffoError: nothing can be done; before any work, and nothing was written.
    """
    if args.mode == "inspect":
        return _each(plan(_inputs(args), None, None, [], []), _inspection(args), args)
    tables = [*report.TABLES, *(["overview.png"] if args.overview else [])]
    jobs = plan(_inputs(args), args.out_path, args.ref_path, WRITTEN[args.mode], tables)
    written = [job.output(suffix) for job in jobs for suffix in WRITTEN[args.mode]]
    there = [path for path in written + [args.out_path / name for name in tables] if path.exists()]
    if there and not args.overwrite:
        raise DiffoError(f"{there[0]} is there already ({len(there)} such outputs); --overwrite replaces them")
    require_writable(make_folder(args.out_path))
    from coding.run import Run  # torch takes seconds: wrong usage is answered before

    work = Run(args)
    status = _each(jobs, work.job, args)
    if work.rows:
        report.write_tables(work.rows, args.out_path, work.about())  # before metrics that may take long
        work.extra_metrics()
        report.write_tables(work.rows, args.out_path, work.about())
        if args.overview and work.pairs:
            work.overview()
        print(report.aligned_table([*work.rows, report.mean_row(work.rows)]))
    return status


def _inputs(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    if not args.demo:
        return inputs(args.in_path, args.mode in ("decompress", "inspect"), args.recursive)
    from datapipe.sources import demo_photographs

    return [(path, Path(path.name)) for path in demo_photographs()]


def _each(jobs: list[Job], work: Callable[[Job], None], args: argparse.Namespace) -> int:
    """The exit status after every job was tried; errors are printed with the input's path."""
    failed = 0
    for job in tqdm(jobs, desc=args.mode, unit="picture", disable=len(jobs) < 2 or args.mode == "inspect"):
        try:
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
        lines = [f"{name:22} {value}" for name, value in facts.items()]
        print(json.dumps(facts) if args.json else "\n".join([*lines, ""]))

    return inspect
