"""Runs the stages of a configuration: batches in, scalars and pictures to the log, checkpoints to the run's folder."""

import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from datapipe.pictures import Pictures, stream
from models.codec import Codec
from release.triple import NAMES, NETWORKS, Triple, save_triple
from training.config import RUN_CONFIG, TrainConfig
from training.speed import Speed
from training.stages import STAGES
from utils import checkpoints, distributed
from utils.config import to_mapping
from utils.errors import CheckpointError, ConfigError
from utils.files import atomic_write
from utils.logging import RunLog

STATE = "training_state.pth"


class Trainer:
    """Runs the stages in order, saves, and goes on where a saved run stopped."""

    def __init__(self, config: TrainConfig, folder: Path, device: torch.device):
        self.config, self.folder, self.device = config, folder, device
        self.log = RunLog(folder, distributed.is_main())
        Speed(config.speed, device).settle()
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
        pictures = Pictures(self.config.data, params.crop_size, self.config.seed)
        world = distributed.world_size()
        self.log.say(
            f"stage {name}: iterations {start} to {params.iterations}, {len(pictures.files)} pictures from "
            f"{self.config.data.folder or 'the demo photographs (no folder was named)'}, "
            f"batch {params.batch_size} x {world}, {self.device}, {stage.speed}"
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
            if (step + 1) % self.config.save_every == 0 and step + 1 < params.iterations:
                self._save(stage, step + 1)
        if name == "gt":
            count = -(-params.statistics // (params.batch_size * world))
            stage.finish(itertools.islice(stream(pictures, params.batch_size, distributed.rank(), world, 0), count))
        self._save(stage, params.iterations)

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
