"""Train DiffO: the image autoencoder (stage `gt`), then VQ base and denoiser together (stage `codec`).

Stage `decoder`, by itself, trains the image decoder D of a release on; stage `light`, by itself, distils a light decoder from such a D.

python main_diffusion_train_vq.py --steps 2 --cfg_path configs/config.yaml --save_dir runs --data pictures/
torchrun --standalone --nproc_per_node=2 main_diffusion_train_vq.py ...          several processes
python main_diffusion_train_vq.py --resume runs/diffo
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

from datapipe.sources import data_options
from training.checkpointing import is_run
from training.config import RUN_CONFIG, TrainConfig, load_config
from training.dry_run import dry_run
from training.perceptual import require_networks
from training.stages import STAGES
from training.start import demo_run, named
from training.trainer import Trainer
from utils import distributed
from utils.commandline import answer, command_parser
from utils.config import Origin, origin_of
from utils.errors import ConfigError
from utils.logging import LOG
from utils.precision import deterministic


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--cfg_path", metavar="YAML", help="configuration (default: configs/config.yaml)")
    add("--save_dir", metavar="DIR", help="the run's folder, DIR/name, is made in it (default: runs)")
    add("--steps", type=int, metavar="T", help="steps of the diffusion schedule")
    add("--resume", metavar="RUN", help="go on with this run folder, with its own configuration")
    add("--auto_resume", action="store_true", help="go on with the run if it is there, else start it")
    add("--data", metavar="PATH", help="pictures: folder, .txt list, or .tar shards ('set-{000..127}.tar', quoted)")
    add("--iterations", type=int, metavar="N", help="of every stage; by the clock (minutes), the measure of warm-up")
    add("--save_every", type=int, metavar="N", help="iterations between checkpoints")
    add("--dry_run", action="store_true", help="print configuration, parameters and an estimate of memory, and stop")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    add("overrides", nargs="*", metavar="key=value", help="for instance codec.optim.lr=1e-4")
    args = parser.parse_intermixed_args(argv)
    for option in ("cfg_path", "save_dir", "auto_resume"):
        if args.resume and getattr(args, option):
            parser.error(f"--resume has the run's own folder and configuration: leave out --{option} (key=value works)")
    if args.resume and any(override.startswith("name=") for override in args.overrides):
        parser.error("--resume goes on in the run's own folder: leave out name=")
    return args


def configure(args: argparse.Namespace) -> tuple[TrainConfig, Path, Origin]:
    """The resolved configuration, the run's folder, and where each value came from."""
    path = args.cfg_path
    if args.resume:
        path = Path(args.resume) / RUN_CONFIG
        for needed in (path, path.with_name(LOG)):
            if not needed.is_file():
                raise ConfigError(f"{args.resume}: not a run folder (no {needed.name} in it)")
    options = {
        "networks.diffusion.steps": args.steps,
        **{f"{name}.iterations": args.iterations for name in STAGES},
        "save_every": args.save_every,
    }
    options = {key: value for key, value in options.items() if value is not None}
    options |= data_options(args.data) if args.data else {}
    for key, override in itertools.product(options, args.overrides):
        if override.partition("=")[0] == key:
            raise ConfigError(f"{override}: an option of the command sets {key} as well; leave out one of them")
    given = str(path or "configs/config.yaml"), args.overrides, options
    config, origin = load_config(*given), origin_of(*given)
    if not args.resume and config.data.is_demo:
        config, told = demo_run(config, origin)
        if is_first():
            print(told, file=sys.stderr, flush=True)
    return config, Path(args.resume or Path(args.save_dir or "runs") / config.name), origin


def is_first() -> bool:
    """Whether this is the process that speaks, before the others are met."""
    return os.environ.get("RANK", "0") == "0"


def require_new(config: TrainConfig, folder: Path, goes_on: bool) -> None:
    """Raise ConfigError where a run cannot begin, before anything is read or written."""
    for name in config.stages:
        with named(name):
            require_networks(getattr(config, name))  # missing weights are told now, not after a stage
    if is_run(folder) and not goes_on:
        raise ConfigError(
            f"{folder}: a run is there already; go on with --resume {folder}, or choose another name=... "
            "(--auto_resume goes on by itself)"
        )


def train(args: argparse.Namespace) -> int | None:
    config, folder, origin = configure(args)
    try:
        if args.dry_run:
            if is_first():  # ranks have nothing to tell each other
                print(dry_run(config))
            return
        require_new(config, folder, bool(args.resume or args.auto_resume))
        device = distributed.local_device(args.device)
        with deterministic(config.deterministic), distributed.process_group(device):
            return Trainer(config, folder, device).run()
    except ConfigError as error:
        if error.key is None:
            raise
        raise ConfigError(f"{origin(error.key, str(error))}: {error.key}: {error}") from error


def main(argv: list[str] | None = None) -> int:
    return answer(train, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
