"""Runs the stages of a configuration: batches in, scalars and pictures to the log, checkpoints to the run's folder."""

import itertools
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from datapipe.pictures import Pictures, lost_worker, stream
from datapipe.sources import open_source
from measuring.metrics import MS_SSIM_MIN_SIDE
from models.codec import Codec
from models.released import NAMES, NETWORKS
from training.checkpointing import Checkpoints, Point
from training.config import RUN_CONFIG, TrainConfig
from training.speed import Speed
from training.stages import STAGES
from training.validation import CELL, Validation
from utils import checkpoints, distributed
from utils.config import to_mapping
from utils.errors import CheckpointError, ConfigError, DiffoError, DiskFull, NotFinite
from utils.files import atomic_write, make_folder, require_writable
from utils.logging import RunLog, Unbroken
from utils.stopping import StopRequest

STOPPED = 128  # and the signal's number: the exit status that shells give to what a signal has ended
FAILED = "failed_state.pth"
OLD_STATE = "training_state.pth"  # of runs before checkpoints were kept by number


def new_codec(config: TrainConfig) -> Codec:
    """A codec with the densities that training needs, initial weights from the seed.

    Raises:
        ConfigError: sizes that do not fit together.
    """
    torch.manual_seed(config.seed)  # alike on every rank
    try:
        codec = Codec(config.networks)
        if codec.residual:
            codec.residual.train_rates()
    except ValueError as error:
        raise ConfigError(f"networks: these sizes do not fit together ({error})") from error
    return codec


def start_from(config: TrainConfig, codec: Codec) -> list[str]:
    """Load the networks that the configuration starts from, in place; one line to tell for each.

    Raises:
        CheckpointError: a file that is not there, or not of that network and size.
    """
    told = []
    for name in NAMES:
        if path := getattr(config, name):
            state, dropped = checkpoints.parameters_of(checkpoints.read(path))
            checkpoints.load_strictly(getattr(codec, name), state, path)
            told.append(f"{name} from {path}, without {len(dropped)} other entries")
    return told


@dataclass(frozen=True)
class Start:
    """Where a run goes on: number of the stage, iterations done, samples that they took, saved state of the stage."""

    stage: int
    step: int = 0
    position: int = 0
    state: dict | None = None


class Trainer:
    """Runs the stages in order, saves, and goes on where a saved run stopped."""

    def __init__(self, config: TrainConfig, folder: Path, device: torch.device):
        self.config, self.folder, self.device = config, folder, device
        Speed(config.speed, device).settle()
        self.codec = new_codec(config).to(device)
        self.validation: dict[str, Validation] = {}
        if config.validation.folder:
            for name in config.stages:
                smallest = MS_SSIM_MIN_SIDE if getattr(config, name).perceptual == "ms_ssim" else CELL
                self.validation[name] = Validation(config.validation, device, smallest)
        self.checkpoints = Checkpoints(folder, config.stages, config.keep_last)
        # "stage", "step" and "loss" of the best weights by validation, and of those of them that are on the disk
        self.best: dict | None = None
        self.saved_best: dict | None = None
        self.position = 0  # of the stream: samples that the stage has taken, on all ranks together
        if distributed.is_main():
            require_writable(make_folder(folder))
        self.log = RunLog(folder, distributed.is_main(), patient=config.on_full_disk == "continue")
        self.source = open_source(config.data.folder, config.data.txt_file_path, config.data.shards)
        counts = distributed.gather_objects(len(self.source))
        if len(set(counts)) > 1:
            raise ConfigError(f"{self.source.name}: ranks find different numbers of pictures there: {counts}")
        if len(set(distributed.gather_objects(self.source.digest()))) > 1:
            raise ConfigError(f"{self.source.name}: ranks find other pictures there, or in another order")

    def run(self) -> int:
        """Train to the end, or to the end of the step in which a signal asks some rank to stop; the exit status.

        Raises:
            DiffoError: what the user can mend.
        """
        with StopRequest() as stop:
            try:
                return self._run(stop)
            except RuntimeError as error:
                if not (lost := lost_worker(error)):
                    raise
                raise DiffoError(
                    f"data.workers={self.config.data.workers}: a process that decodes pictures is lost ({lost}). Mostly memory "
                    "is short, or shared memory (docker run --shm-size=8g), of which fewer workers need less. Go on with "
                    f"--resume {self.folder} data.workers=..."
                ) from error

    def _run(self, stop: StopRequest) -> int:
        start = self._resume()
        if distributed.is_main():  # also on resuming: overrides may have changed it
            text = yaml.safe_dump(to_mapping(self.config), sort_keys=False)
            atomic_write(self.folder / RUN_CONFIG, text.encode())
        for index, name in enumerate(self.config.stages):
            if index >= start.stage and not self._stage(name, start if index == start.stage else Start(index), stop):
                self.log.say(f"stopped as asked; go on with --resume {self.folder}")
                self.log.close()
                return STOPPED + (stop.number or signal.SIGTERM)
        self.log.say(f"finished: {self.folder}")
        self.log.close()
        return 0

    def _stage(self, name: str, start: Start, stop: StopRequest) -> bool:
        """Train a stage from where it stands; False if it was asked to stop before its end, and has saved."""
        params = getattr(self.config, name)
        stage = STAGES[name](self.config, self.codec, self.device)
        if self.best and self.best["stage"] != name:
            self.best = self.saved_best = None
        if start.state:
            stage.load_state_dict(start.state)
            start.state.clear()  # moments and averages, as large as the networks
        self.position = start.position
        last = max(params.iterations, start.step)  # where fewer are asked for than are done, the stage ends at once
        self.log.begin(name, start.step)
        self.log.say(
            f"stage {name}: iterations {start.step} to {last}, {len(self.source)} pictures from {self.source.name}, "
            f"batch {params.batch_size} x {distributed.world_size()}, {self.device}, {stage.speed}"
        )
        taken = params.batch_size * distributed.world_size()
        if start.position != start.step * taken:
            before = start.position / start.step
            self.log.say(f"a step took {before:g} pictures before and takes {taken} from here on")
        batches = self._batches(stage, start.position)
        if start.step == 0 and name == "codec":
            batches = self._look_at_latent(batches)
        steps = range(start.step, last)
        shown = dict(initial=start.step, total=last, desc=name, mininterval=1.0, file=Unbroken(sys.stderr))
        for step in (bar := tqdm(steps, disable=not distributed.is_main(), **shown)):
            loss = self._step(stage, step, batches)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            done = step + 1
            better = self._validate(stage, done)
            stopped = distributed.on_any_rank(stop.number is not None, self.device)
            more = done < last or stage.finishes  # something is still to come, which may take long
            if more and (better or stopped or done == last or done % self.config.save_every == 0):
                self._save(stage, done)
                if stopped:
                    return False
        if stage.finishes:
            stage.finish(itertools.islice(self._batches(stage, 0), -(-params.statistics // taken)))
        self._tell_unreadable()
        self._save(stage, last, finished=True)
        return True

    def _batches(self, stage, position: int) -> Iterator:
        """This rank's batches for a stage, from a position of the stream on."""
        params, pinned = stage.params, self.device.type == "cuda"
        pictures = Pictures(self.config.data, params.crop_size, self.config.seed, self.source)
        return stream(pictures, params.batch_size, distributed.rank(), distributed.world_size(), position, pinned)

    def _look_at_latent(self, batches: Iterator) -> Iterator:
        """The same batches; says so if the autoencoder's latent is far from what the noise schedule is made for."""
        first = next(batches)
        with torch.no_grad():
            deviation = self.codec.to_latent(first[0].to(self.device)).std().item()
        if not 0.7 < deviation < 1.4:
            self.log.say(
                f"the latent's standard deviation is {deviation:.2f}, and the noise schedule is made for about 1. Stage gt "
                "rescales it in its last checkpoint alone; public weights are used as they are"
            )
        return itertools.chain([first], batches)

    def _step(self, stage, step: int, batches: Iterator) -> float:
        """One update and what is logged of it; returns the loss."""
        began = time.perf_counter()
        image, positions = next(batches)
        try:
            logs, rows = stage.step(image.to(self.device, non_blocking=True), positions, step)
        except NotFinite as error:
            raise self._failed(stage, step, error) from error
        pictures = stage.params.batch_size * distributed.world_size()
        self.position += pictures
        logs["pictures_per_second"] = pictures / (time.perf_counter() - began)
        self.log.step(stage.name, step, logs)
        if step % self.config.picture_every == 0:
            self.log.pictures(stage.name, step, rows)
            self._tell_unreadable()
        return logs["loss"]

    def _tell_unreadable(self) -> None:
        for line in self.source.unreadable_lines():
            self.log.say(line)

    def _validate(self, stage, done: int) -> bool:
        """Score the averaged weights when it is time; True if they are the best so far, and so must be saved."""
        last = done == stage.params.iterations
        if stage.name not in self.validation or not (last or done % self.config.validation.every == 0):
            return False
        try:
            with stage.speed.eager():
                scores, rows = self.validation[stage.name].run(stage)
        except NotFinite as error:
            raise self._failed(stage, done, error) from error
        self.log.validation(stage.name, done, scores, rows)
        better = not self.best or scores["loss"] < self.best["loss"]
        if better:
            self.best = {"stage": stage.name, "step": done, "loss": scores["loss"]}
        return better

    def _state(self, stage) -> dict:
        training = {"codec": self.codec.state_dict(), "training": stage.state_dict()}
        return training | {"best": self.best, "position": self.position}

    def _save(self, stage, step: int, finished: bool = False) -> None:
        """Write a checkpoint, then remove those that need not stay; every rank waits for it.

        Args:
            finished: the stage is done with, not only all its iterations.
        Raises:
            DiskFull: unless the configuration says to go on.
        """
        told: str | None = None
        if distributed.is_main():
            raw = {n: getattr(self.codec, n).state_dict() for n in NETWORKS if getattr(self.codec, n) is not None}
            point, state = Point(stage.name, step), self._state(stage) | {"finished": finished}
            try:
                told = f"stage {stage.name}, iteration {step} is not saved"
                self.checkpoints.save(point, raw, stage.states(), self.config.networks, state)
                told = f"stage {stage.name}, iteration {step} is saved, but not which one is the best"
                self.checkpoints.keep(self.best)
                told = None
                self.log.say(f"stage {stage.name}: saved iteration {step}")
            except DiskFull as full:
                told = f"{told}: {full}"
        if not distributed.on_any_rank(told is not None, self.device):
            self.saved_best = self.best
            return
        self.best = self.saved_best
        told = told or f"stage {stage.name}, iteration {step}: see the main process"
        if self.config.on_full_disk == "stop":
            raise DiskFull(
                f"{told}. Make room and go on with --resume {self.folder}, or set on_full_disk=continue to train on"
            )
        self.log.say(f"{told}; training goes on (on_full_disk: continue)")

    def _failed(self, stage, step: int, error: NotFinite) -> DiffoError:
        """Keep the state that a step or a validation failed in, apart from the checkpoints. All ranks come here."""
        path, told = self.folder / FAILED, ""
        if distributed.is_main():
            try:
                about = {"stage": stage.name, "step": step, "failed": str(error)}
                checkpoints.save(path, about | self._state(stage))
            except DiffoError as unwritten:
                told = f" (not written: {unwritten})"
        distributed.barrier()  # a rank that ends has the others stopped
        going_on = f"; the last checkpoint is as it was (--resume {self.folder})" if self.checkpoints.points() else ""
        return NotFinite(f"{error}. The state then is kept in {path}{told}{going_on}")

    def _resume(self) -> Start:
        """Where to go on, with the networks as they were there; the beginning, if nothing was saved.

        Raises:
            CheckpointError: an older version's run, or ranks that see different checkpoints.
        """
        stages = list(self.config.stages)
        if (self.folder / OLD_STATE).exists():
            raise CheckpointError(f"{self.folder}: an older version's run ({OLD_STATE}); go on with that version")
        saved, refused = self.checkpoints.newest()
        seen = distributed.gather_objects(saved and (saved["stage"], saved["step"]))  # before anything is moved
        if len(set(seen)) > 1:
            raise CheckpointError(f"{self.folder}: ranks see different newest checkpoints ({seen}): is it shared?")
        for reason in refused.values():
            self.log.say(f"passed over: {reason}")
        if distributed.is_main():
            self.checkpoints.set_aside(refused)
            self.checkpoints.remove_unfinished()
        if saved is None:
            self.log.keep_until(stages[0], 0, stages)
            for told in start_from(self.config, self.codec):
                self.log.say(told)
            return Start(0)
        where = f"{self.folder}, {saved['stage']} {saved['step']}"
        if "position" not in saved or "finished" not in saved:
            raise CheckpointError(f"{where}: an older version's checkpoint; go on with that version")
        checkpoints.load_strictly(self.codec, saved["codec"], where)
        self.best = self.saved_best = saved["best"]
        if distributed.is_main():
            self.checkpoints.keep(self.best)  # it may have been killed before it did
        self.log.keep_until(saved["stage"], saved["step"], stages)
        self.log.say(f"resumed after {saved['stage']} {saved['step']}: {' '.join(sys.argv[1:])}")
        return self._next(saved, where)

    def _next(self, saved: dict, where: str) -> Start:
        """The stage that a saved state goes on with: its own, unless that is finished."""
        name, step, index = saved["stage"], saved["step"], self.config.stages.index(saved["stage"])
        asked = getattr(self.config, name).iterations
        if not saved["finished"] or (asked > step and not STAGES[name].finishes):
            return Start(index, step, saved["position"], saved["training"])
        if asked > step and name == self.config.stages[-1]:
            raise CheckpointError(
                f"{where}: stage {name} has ended there, and what ends it cannot be taken back: for {asked} iterations "
                f"train anew under another name=..."
            )
        return Start(index + 1)
