"""All inputs of one invocation of `inference.py`: one that fails does not stop the rest."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from coding import report
from coding.plan import OVERVIEW, STREAM, Job, inputs, names_a_file, plan
from coding.table import Table
from utils.commandline import loading
from utils.errors import DiffoError
from utils.files import made_folder, require_writable
from utils.stopping import STOPPED, StopRequest

if TYPE_CHECKING:  # torch takes seconds: wrong usage is answered before
    from coding.run import Result, Run

TABLE = "metrics"
TABLES = [f"{TABLE}.csv", f"{TABLE}.json"]
WRITTEN = {"roundtrip": [STREAM, ".png"], "compress": [STREAM], "decompress": [".png"]}
ROUND = 64  # pictures that each of several processes does before it tells the others what came of them


def run(args: argparse.Namespace) -> int:
    """Do what the options of `coding.options` say; the exit status is 1 where an input could not be done.

    Raises:
        DiffoError: nothing can be done; before any work, and nothing was written.
    """
    if args.mode == "inspect":
        return _inspect(args)
    files, suffixes = _inputs(args), WRITTEN[args.mode]
    alone = names_a_file(args.out_path, suffixes, len(files))
    if alone and args.overview:
        raise DiffoError(f"{args.out_path}: one file; --overview needs a folder, name one with -o DIR")
    folder, tables = (args.out_path.parent, []) if alone else (args.out_path, TABLES)
    tables = [*tables, OVERVIEW] if args.overview else tables
    jobs = plan(files, args.out_path, args.ref_path, suffixes, tables, {} if alone else _known(folder))
    written = [job.output(suffix) for job in jobs for suffix in suffixes]
    _require_free(written + [folder / OVERVIEW] * args.overview, args)
    if "RANK" not in os.environ:  # other processes could see the folder come and go
        with made_folder(folder):
            require_writable(folder)
    with loading():
        from coding.run import Run
        from utils.distributed import is_main, local_device, process_group
    with process_group(local_device(args.device)), made_folder(folder):
        work = Run(args, folder)
        table = None if alone else Table(folder, TABLE, work.about, writes=is_main())
        tally = _carried_out(work, jobs, table)
        if is_main():
            tally.tell(jobs, suffixes, folder, tables)
    return tally.status


def _carried_out(work: "Run", jobs: list[Job], table: Table | None) -> "Tally":
    """All jobs, and what came of them."""
    from utils.distributed import gather_objects, is_main

    args = work.args
    stop = StopRequest()
    with table or nullcontext(), stop if len(jobs) > 1 else nullcontext():  # a single picture is given up at once
        work.earlier.table = table
        left = [job for job in jobs if not (args.skip_existing and work.earlier.stands(job))]
        gather_objects(len(left))  # every rank has seen what is there, and has the same jobs, before one writes
        tally = Tally(table, len(jobs), len(left), args.mode)
        tally.stopped_by = _shared_out(work, left, tally, stop)
        if table:
            table.arrange([job.name for job in jobs])
        if is_main():
            for reason in work.evaluator.left_out.values():
                print(f"skipped: {reason}", file=sys.stderr)
            if args.overview and not tally.stopped_by:
                work.overview(jobs)
    return tally


def _shared_out(work: "Run", jobs: list[Job], tally: "Tally", stop: StopRequest) -> int | None:
    """Do the jobs, each on one of the ranks, which tell each other after every round; the signal that ended it early."""
    from utils.distributed import gather_objects, rank, world_size

    size = ROUND * world_size() if world_size() > 1 else max(1, len(jobs))
    for first in range(0, len(jobs), size):
        own: list[Result] = []

        def take(result: "Result", own=own) -> None:
            own.append(result)
            tally.take(result)

        work.each(jobs[first : first + size][rank() :: world_size()], take, lambda: stop.number is not None)
        results, signals = zip(*gather_objects((own, stop.number)), strict=True)
        for number, others in enumerate(results):
            for result in others if number != rank() else []:
                tally.take(result, told=True)
        if any(signals):
            return next(filter(None, signals))
    return stop.number


class Tally:
    """What came of the jobs: rows, which the table gets as they come, and errors.

    Args:
        total, left: number of all jobs, and of those that are not done already.
    """

    def __init__(self, table: Table | None, total: int, left: int, mode: str):
        from utils.distributed import is_main

        self.table, self.total, self.there = table, total, total - left
        self.rows: dict[str, report.Row] = {}
        self.failed = 0
        self.stopped_by: int | None = None  # number of a signal
        self._bar = tqdm(total=left, desc=mode, unit="picture", disable=left < 2 or not is_main())

    def take(self, result: "Result", told: bool = False) -> None:
        """Count a result; `told`: another rank has told its error."""
        self._bar.update()
        if result.row is None:
            self.failed += 1
            if not told:
                tqdm.write(f"error: {result.error}", file=sys.stderr)
            return
        self.rows[result.job.name] = result.row
        if self.table:
            self.table.add(result.row)

    @property
    def status(self) -> int:
        return STOPPED + self.stopped_by if self.stopped_by else 1 if self.failed else 0

    def tell(self, jobs: list[Job], suffixes: list[str], folder: Path, tables: list[str]) -> None:
        """The end of the run, to the user."""
        self._bar.close()
        if self.failed and self.total > 1:
            print(f"error: {self.failed} of {self.total} inputs could not be done", file=sys.stderr)
        if self.there:
            print(f"{self.there} of {self.total} are there already and stay (--skip_existing)", file=sys.stderr)
        if self.stopped_by:
            print("interrupted", file=sys.stderr)
            return
        done = [job for job in jobs if job.name in self.rows]
        rows = [self.rows[job.name] for job in done]
        if rows:
            print(report.aligned_table([*rows, report.mean_row(rows)] if len(rows) > 1 else rows))
            print(_where(done, suffixes, folder, tables))


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
    if there and not (args.overwrite or args.skip_existing):
        told = "--overwrite replaces them, --skip_existing leaves them and does the rest"
        raise DiffoError(f"{there[0]} is there already ({len(there)} such outputs); {told}")


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


def _inspect(args: argparse.Namespace) -> int:
    """Tell what is in each file; errors with the file's path."""
    files = [path for path, _ in _inputs(args)]
    inspection, failed = _inspection(args), 0
    for path in files:
        try:
            inspection(path)
        except DiffoError as error:
            failed += 1
            told = str(error) if str(path) in str(error) else f"{path}: {error}"
            print(f"error: {told}", file=sys.stderr)
    if failed and len(files) > 1:
        print(f"error: {failed} of {len(files)} inputs could not be done", file=sys.stderr)
    return 1 if failed else 0


def _inspection(args: argparse.Namespace) -> Callable[[Path], None]:
    """Prints header, ledger and, where the weights are named or ship, the estimated cost of a file."""
    with loading():
        from coding import ledger
        from coding.weights import Weights, read_bytes
        from models.bitstream import VERSION, unpack
        from models.released import release_named
    weights = Weights(args)

    def inspect(path: Path) -> None:
        data = read_bytes(path, args.max_pixels)
        file = unpack(data, args.preview)
        release = release_named(file.fingerprint)
        facts = {"file": str(path), "version": VERSION} | ledger.ledger(file)
        if release or weights.named:
            codec = weights.codec(file.fingerprint)
            facts |= ledger.beside(codec, codec.read(data, args.preview))
        coded = "range coder, in passes" if file.in_passes else "range coder"
        facts["base_coding"] = "fixed length" if file.fixed_length else coded
        facts |= {"weights": file.fingerprint.hex(), "release": release}
        told = facts | {"bpp": f"{facts['bpp']:.4f}", "release": release or "none of those that ship"}
        lines = [f"{name:22} {value}" for name, value in told.items()]
        print(json.dumps(facts) if args.json else "\n".join([*lines, ""]))

    return inspect
