"""Train DiffO: the image autoencoder (stage `gt`), then VQ base and denoiser together (stage `codec`).

    torchrun --standalone --nproc_per_node=1 --nnodes=1 main_diffusion_train_vq.py --steps 2 \\
        --cfg_path configs/config.yaml --save_dir runs --data pictures/
    python main_diffusion_train_vq.py --resume runs/diffo
"""

import argparse
import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from datapipe.pictures import Pictures, stream
from datapipe.sources import data_options, open_source
from models.codec import Codec
from release.triple import NAMES, NETWORKS, Triple, save_triple
from training.config import RUN_CONFIG, TrainConfig, load_config
from training.perceptual import perceptual_term
from training.stages import STAGES
from utils import checkpoints, distributed
from utils.commandline import answer
from utils.config import to_mapping
from utils.errors import CheckpointError, ConfigError
from utils.files import atomic_write
from utils.logging import RunLog

STATE = "training_state.pth"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg_path", metavar="YAML", help="configuration (default: configs/config.yaml)")
    parser.add_argument("--save_dir", default="runs", metavar="DIR", help="the run's folder is made in it")
    parser.add_argument("--steps", type=int, metavar="T", help="steps of the diffusion schedule")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder, with its own configuration")
    parser.add_argument("--data", metavar="PATH", help="training pictures: folder, .txt list, or .tar shards")
    parser.add_argument("--iterations", type=int, metavar="N", help="iterations of every stage")
    parser.add_argument("--save_every", type=int, metavar="N", help="iterations between checkpoints")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance codec.optim.lr=1e-4")
    args = parser.parse_intermixed_args(argv)
    if args.resume and args.cfg_path:
        parser.error("--resume goes on with the run's own configuration: leave out --cfg_path (key=value still works)")
    return args


def configure(args: argparse.Namespace) -> tuple[TrainConfig, Path]:
    """The resolved configuration and the run's folder."""
    path = args.cfg_path
    if args.resume:
        path = Path(args.resume) / RUN_CONFIG
        if not path.is_file():
            raise ConfigError(f"{args.resume}: not a run folder (no {RUN_CONFIG} in it)")
    options = {
        "networks.diffusion.steps": args.steps,
        "gt.iterations": args.iterations,
        "codec.iterations": args.iterations,
        "save_every": args.save_every,
    }
    options = {key: value for key, value in options.items() if value is not None}
    options |= data_options(args.data) if args.data else {}
    config = load_config(str(path or "configs/config.yaml"), args.overrides, options)
    for stage in config.stages:
        perceptual_term(getattr(config, stage).perceptual)  # missing weights are told now, not after the first stage
    folder = Path(args.resume) if args.resume else Path(args.save_dir) / config.name
    if not args.resume and (folder / STATE).exists():
        raise ConfigError(f"{folder}: a run is there already; go on with --resume {folder}, or choose another name=...")
    return config, folder


class Trainer:
    """Runs the stages in order, saves, and goes on where a saved run stopped."""

    def __init__(self, config: TrainConfig, folder: Path, device: torch.device):
        self.config, self.folder, self.device = config, folder, device
        self.log = RunLog(folder, distributed.is_main())
        torch.manual_seed(config.seed)  # initial weights, alike on every rank
        try:
            self.codec = Codec(config.networks).to(device)
            if self.codec.residual:
                self.codec.residual.train_rates()
        except ValueError as error:
            raise ConfigError(f"networks: these sizes do not fit together ({error})") from error
        for name in NAMES:
            if path := getattr(config, name):
                state, dropped = checkpoints.parameters_of(checkpoints.read(path))
                checkpoints.load_strictly(getattr(self.codec, name), state, path)
                self.log.say(f"{name} from {path}, without {len(dropped)} other entries")
        self.source = open_source(config.data.folder, config.data.txt_file_path, config.data.shards)
        counts = distributed.gather_objects(len(self.source))
        if len(set(counts)) > 1:
            raise ConfigError(f"{self.source.name}: ranks find different numbers of pictures there: {counts}")

    def run(self) -> None:
        first, step, state = self._resume()
        if distributed.is_main():  # also on resuming: overrides may have changed it
            text = yaml.safe_dump(to_mapping(self.config), sort_keys=False)
            atomic_write(self.folder / RUN_CONFIG, text.encode())
        for index, name in enumerate(self.config.stages):
            if index >= first:
                self._stage(name, step if index == first else 0, state if index == first else None)
        self.log.say(f"finished: {self.folder}")
        self.log.close()

    def _stage(self, name: str, start: int, state: dict | None) -> None:
        params = getattr(self.config, name)
        stage = STAGES[name](self.config, self.codec, self.device)
        if state:
            stage.load_state_dict(state)
        pictures = Pictures(self.config.data, params.crop_size, self.config.seed, self.source)
        world = distributed.world_size()
        self.log.say(
            f"stage {name}: iterations {start} to {params.iterations}, {len(self.source)} pictures from "
            f"{self.source.name}, batch {params.batch_size} x {world}, {self.device}"
        )
        batches = iter(stream(pictures, params.batch_size, distributed.rank(), world, start))
        bar = tqdm(
            range(start, params.iterations),
            initial=start,
            total=params.iterations,
            desc=name,
            disable=not distributed.is_main(),
            mininterval=1.0,
        )
        for step in bar:
            began = time.perf_counter()
            image, positions = next(batches)
            logs, rows = stage.step(image.to(self.device, non_blocking=True), positions, step)
            logs["pictures_per_second"] = params.batch_size * world / (time.perf_counter() - began)
            self.log.step(name, step, logs)
            bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
            if step % self.config.picture_every == 0:
                self.log.pictures(name, step, rows)
                self._tell_unreadable()
            if (step + 1) % self.config.save_every == 0 and step + 1 < params.iterations:
                self._save(stage, step + 1)
        if name == "gt":
            count = -(-params.statistics // (params.batch_size * world))
            stage.finish(itertools.islice(stream(pictures, params.batch_size, distributed.rank(), world, 0), count))
        self._tell_unreadable()
        self._save(stage, params.iterations)

    def _tell_unreadable(self) -> None:
        for line in self.source.unreadable_lines():
            self.log.say(line)

    def _save(self, stage, step: int) -> None:
        """Published names for the weights, and everything needed to go on, written last."""
        if distributed.is_main():
            raw = {n: getattr(self.codec, n).state_dict() for n in NETWORKS if getattr(self.codec, n) is not None}
            for sub, prefix, states in [("ckpts", "", raw), ("ema_ckpts", "ema_", stage.states())]:
                triple = Triple.of(self.folder / sub, step)
                triple = replace(triple, unet=triple.unet.with_name(f"{prefix}model_{step}.pth"))
                triple.unet.parent.mkdir(exist_ok=True)
                if stage.name == "gt":
                    checkpoints.save(triple.autoencoder, {"state_dict": states["autoencoder"]})
                else:
                    save_triple(triple, states, self.config.networks)
            state = {
                "stage": stage.name,
                "step": step,
                "codec": self.codec.state_dict(),
                "training": stage.state_dict(),
            }
            checkpoints.save(self.folder / STATE, state)
            self.log.say(f"stage {stage.name}: saved iteration {step}")
        distributed.barrier()

    def _resume(self) -> tuple[int, int, dict | None]:
        """Index of the stage to run first, its first step and its saved state."""
        if not (self.folder / STATE).is_file():
            self.log.keep_until(self.config.stages[0], 0, list(self.config.stages))
            return 0, 0, None
        saved = checkpoints.read(self.folder / STATE)
        if saved.get("stage") not in self.config.stages:
            raise CheckpointError(f"{self.folder / STATE}: of a stage that the configuration does not have")
        checkpoints.load_strictly(self.codec, saved["codec"], self.folder / STATE)
        index, step, state = self.config.stages.index(saved["stage"]), saved["step"], saved["training"]
        if step >= getattr(self.config, saved["stage"]).iterations:  # that stage is done
            index, step, state = index + 1, 0, None
        if index < len(self.config.stages):
            self.log.keep_until(self.config.stages[index], step, list(self.config.stages))
        self.log.say(f"resumed: {' '.join(sys.argv[1:])}")
        return index, step, state


def train(args: argparse.Namespace) -> None:
    device = distributed.local_device(args.device)
    config, folder = configure(args)
    with distributed.process_group(device):
        Trainer(config, folder, device).run()


def main(argv: list[str] | None = None) -> int:
    return answer(train, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
