"""Make a release from a training run: averaged weights, integer tables, fingerprint, digests.

python -m release runs/tiny weights/tiny --data pictures/
"""

import argparse
import json
import sys
from pathlib import Path

from datapipe.sources import data_options
from models.released import NAMES, Triple, load_triple
from release.making import COUNTED, require_empty, write_release
from release.tables import count
from training.checkpointing import AVERAGES, BEST, Checkpoints
from training.config import RUN_CONFIG, load_config
from utils.commandline import answer, positive
from utils.errors import CheckpointError


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of main_diffusion_train_vq.py")
    parser.add_argument("out", type=Path, help="release folder, for instance weights/mine")
    parser.add_argument(
        "--iteration", metavar="N", help="of the checkpoint, or `best` by validation (default: the newest)"
    )
    parser.add_argument("--data", metavar="PATH", help="training pictures as for training (default: the run's)")
    parser.add_argument(
        "--crops", type=positive, default=COUNTED, metavar="N", help=f"crops to count (default {COUNTED})"
    )
    return parser.parse_args(argv)


def newest(run: Path) -> int:
    """Largest iteration of the stage codec that a run has saved whole."""
    complete = [
        point.step
        for point in Checkpoints(run, ["gt", "codec"], keep_last=1).points()
        if point.stage == "codec" and all((run / AVERAGES / n.format(point.step)).is_file() for n in NAMES.values())
    ]
    if not complete:
        raise CheckpointError(f"{run}: no complete checkpoint to release; has the stage codec saved yet?")
    return max(complete)


def chosen(run: Path, iteration: str | None) -> int:
    """The iteration that is asked for: a number, `best`, or None for the newest.

    Raises:
        CheckpointError: there is none, or it is no iteration.
    """
    if iteration is None:
        return newest(run)
    if iteration != "best":
        if not iteration.isdecimal():
            raise CheckpointError(f"--iteration {iteration}: a number, or best")
        return int(iteration)
    best = json.loads((run / BEST).read_text()) if (run / BEST).is_file() else None
    if best is None or best["stage"] != "codec":
        raise CheckpointError(f"{run}: no validation of stage codec has chosen a checkpoint (validation.folder=DIR)")
    return best["step"]


def release(args: argparse.Namespace) -> None:
    require_empty(args.out)
    config = load_config(str(args.run / RUN_CONFIG), values=data_options(args.data) if args.data else {})
    iteration = chosen(args.run, args.iteration)
    codec = load_triple(Triple.of(args.run / AVERAGES, iteration))
    notes = count(codec, config, args.crops).install(codec)
    about = write_release(args.out, iteration, codec, config, **notes)
    print(json.dumps(about, indent=1))


def main(argv: list[str] | None = None) -> int:
    return answer(release, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
