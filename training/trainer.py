"""Runs the stages of a configuration: batches in, scalars and pictures to the log, checkpoints to the run's folder."""

import itertools
import json
import signal
import sys
import time
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from datapipe.pictures import Batch, Pictures, stream
from models.released import NETWORKS
from models.stated import require_same, stored_params
from training.checkpointing import Checkpoints, Point, is_run
from training.config import RUN_CONFIG, TrainConfig
from training.progress import Progress
from training.speed import Speed
from training.stage import Stage
from training.stages import STAGES
from training.start import new_codec, start_from, training_pictures, validation_of
from training.step import Done, Step
from utils import checkpoints, distributed
from utils.config import to_mapping
from utils.errors import CheckpointError, ConfigError, DiffoError, NotFinite
from utils.files import atomic_write, held, make_folder, require_writable
from utils.logging import LOG, RunLog, Unbroken
from utils.stopping import STOPPED, StopRequest

FAILED = "failed_state.pth"


class Trainer:
    """Runs the stages in order, saves, and goes on where a saved run stopped.

    What the configuration names is opened here, before anything is written.

    Raises:
        DiffoError: something that it names is not there, or cannot be used.
    """

    def __init__(self, config: TrainConfig, folder: Path, device: torch.device):
        self.config, self.folder, self.device = config, folder, device
        Speed(config.speed, device).settle()
        self.codec = new_codec(config).to(device)
        self.validation = {name: validation_of(config, name, device) for name in config.stages}
        self.checkpoints = Checkpoints(folder, config.stages, config.keep_last)
        self.best: dict | None = None  # "stage", "step" and "loss" of the best weights by validation
        self.position = 0  # of the stream: samples that the stage has taken, on all ranks together
        self._logged: tuple[float, int] | None = None  # when scalars were written last, and the position then
        self.source = training_pictures(config)
        counts = distributed.gather_objects(len(self.source))
        if len(set(counts)) > 1:
            raise ConfigError(f"{self.source.name}: ranks find different numbers of pictures there: {counts}")
        if len(set(distributed.gather_objects(self.source.digest()))) > 1:
            raise ConfigError(f"{self.source.name}: ranks find other pictures there, or in another order")
        self.started_from = [] if is_run(folder) else start_from(config, self.codec)  # lines to tell

    def run(self) -> int:
        """Train to the end, or to the end of the step in which a signal asks some rank to stop; the exit status.

        Raises:
            DiffoError: what the user can mend.
        """
        main = distributed.is_main()
        with StopRequest() as stop, self._held(main), closing(RunLog(self.folder, main)) as self.log:
            try:
                first, saved = self._resume()
                for index, name in enumerate(self.config.stages[first:], first):
                    if not self._stage(name, saved if index == first else {}, stop):
                        self.log.say(f"stopped as asked; go on with --resume {self.folder}")
                        return STOPPED + (stop.number or signal.SIGTERM)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise DiffoError(
                    f"data.workers={self.config.data.workers}: a process that decodes pictures is lost. Memory is short, or "
                    f"shared memory (docker run --shm-size=8g): go on with fewer, --resume {self.folder} data.workers=..."
                ) from error
            self.log.say(f"finished: {self.folder}")
            return 0

    def _held(self, main: bool) -> AbstractContextManager:
        """The run's folder, made where it is not there, held against a second run in it."""
        if not main:
            return nullcontext()
        require_writable(make_folder(self.folder))
        return held(self.folder / LOG)

    def _stage(self, name: str, saved: dict, stop: StopRequest) -> bool:
        """Train a stage from where it stands; False if it was asked to stop before its end, and has saved."""
        params = getattr(self.config, name)
        stage = STAGES[name](self.config, self.codec, self.device)
        if stage.begins and not saved:
            with closing(self._batches(stage, 0, alone=True)) as batches:
                self.log.say(stage.begin(itertools.islice(batches, -(-params.statistics // params.batch_size))))
        torch.manual_seed(self.config.seed)  # of a discriminator, whatever this process has done before
        step = Step(stage)
        if self.best and self.best["stage"] != name:
            self.best = None
        progress = Progress(params, saved.get("step", 0), saved.get("seconds", 0.0))
        self.position, self._logged = saved.get("position", 0), None
        rate = None  # of the last iteration, where the stage had ended
        if saved:
            rate = saved["training"]["optimiser"]["param_groups"][0]["lr"] if saved["finished"] else None
            step.load_state_dict(saved["training"], saved["averages"])
            saved.clear()  # moments and averages, as large as the networks
        if distributed.is_main():  # here, where what was saved has been found to fit; overrides may have changed it
            text = yaml.safe_dump(to_mapping(self.config), sort_keys=False)
            atomic_write(self.folder / RUN_CONFIG, text.encode())
        self._tell_start(step, progress, rate)
        with closing(self._batches(stage, self.position)) as batches, self._bar(name, progress) as bar:
            while not progress.done:
                stopped = self._step(step, next(batches), progress, stop, bar)
                if progress.done:  # a request during the last step is not for the next stage to find
                    stopped = any(distributed.gather_objects(stop.number is not None))
                better = self._validate(step, progress)
                at_end = progress.done and not stage.finishes  # saved below, once, as finished
                if not at_end and (better or stopped or progress.done or progress.step % self.config.save_every == 0):
                    self._save(step, progress, better=better)
                    if stopped:
                        return False
        if stage.finishes:
            taken = params.batch_size * distributed.world_size()
            with closing(self._batches(stage, 0)) as batches:
                step.finish(itertools.islice(batches, -(-params.statistics // taken)))
        self._tell_unreadable()
        self._save(step, progress, finished=True)
        return True

    def _tell_start(self, step: Step, progress: Progress, rate: float | None) -> None:
        name, params = step.stage.name, step.stage.params
        self.log.begin(name, progress.step)
        length = f"to {params.iterations}" if params.minutes is None else f"on, {params.minutes:g} minutes in all"
        self.log.say(
            f"stage {name}: iterations {progress.step} {length}, {len(self.source)} pictures from {self.source.name}{self.source.left_out}, "
            f"batch {params.batch_size} x {distributed.world_size()}, {self.device}, {step.speed}"
        )
        if params.minutes is not None:
            self.log.say("this stage ends by the clock: it is not repeatable step by step")
        taken = params.batch_size * distributed.world_size()
        if self.position != progress.step * taken:
            before = self.position / progress.step
            self.log.say(f"a step took {before:g} pictures before and takes {taken} from here on")
        if rate is not None:
            now, last = step.optimiser.lr(progress.at), step.optimiser.lr(params.iterations)
            self.log.say(
                f"stage {name} had ended and is longer now, and its learning rate follows the place in the whole stage: it "
                f"was {rate:g} at the end, goes on at {now:g} and ends at {last:g}"
            )

    def _bar(self, name: str, progress: Progress) -> tqdm:
        shown = dict(desc=name, mininterval=1.0, file=Unbroken(sys.stderr), disable=not distributed.is_main())
        if progress.minutes is None:
            return tqdm(total=progress.iterations, initial=progress.step, **shown)
        clock = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
        return tqdm(total=60 * progress.minutes, initial=progress.seconds, bar_format=clock, **shown)

    def _batches(self, stage: Stage, position: int, alone: bool = False):
        """This rank's batches for a stage, from a position of the stream on; `alone`, as if there were no other rank."""
        params, pinned = stage.params, self.device.type == "cuda"
        draws = stage.draw_params(params.crop_size, params.crop_size)
        pictures = Pictures(self.config.data, params.crop_size, self.config.seed, self.source, draws)
        rank, world = (0, 1) if alone else (distributed.rank(), distributed.world_size())
        return stream(pictures, params.batch_size, rank, world, position, pinned)

    def _step(self, step: Step, batch: Batch, progress: Progress, stop: StopRequest, bar: tqdm) -> bool:
        """One update and what is logged of it; whether some rank is asked to stop."""
        batch = batch.to(self.device)
        name, number = step.stage.name, progress.step
        if number == 0 and (remark := step.stage.remark(batch)):
            self.log.say(remark)
        try:
            done = step(batch, progress, stop.number is not None)
        except NotFinite as error:
            raise self._failed(step, progress, error) from error
        self.position += len(batch) * distributed.world_size()
        bar.update(1 if progress.minutes is None else min(progress.seconds, bar.total) - bar.n)
        if number % self.config.log_every == 0:
            self._log(step, number, done, bar)
        if number % self.config.picture_every == 0:
            if done.restored is not None:
                self.log.pictures(name, number, [done.image, done.restored])
            self._tell_unreadable()
        return done.flags.stop

    def _log(self, step: Step, number: int, done: Done, bar: tqdm) -> None:
        """Fetch and write the scalars of an update, and the speed since the last that was written."""
        logs = step.logs(done)
        now, last = (time.perf_counter(), self.position), self._logged
        if last:
            logs["pictures_per_second"] = (now[1] - last[1]) / (now[0] - last[0])
        self._logged = now
        if self.device.type == "cuda":
            logs["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
        self.log.step(step.stage.name, number, logs)

    def _tell_unreadable(self) -> None:
        for line in self.source.unreadable_lines():
            self.log.say(line)

    def _validate(self, step: Step, progress: Progress) -> bool:
        """Score the averaged weights when it is time; True if they are the best so far, and so must be saved."""
        name, number = step.stage.name, progress.step
        if not self.validation[name] or not (progress.done or number % self.config.validation.every == 0):
            return False
        try:
            with step.speed.eager():
                scores, rows = self.validation[name].run(step.stage, step.averages)
        except NotFinite as error:
            raise self._failed(step, progress, error) from error
        self.log.validation(name, number, scores, rows)
        better = not self.best or scores["loss"] < self.best["loss"]
        if better:
            self.best = {"stage": name, "step": number, "loss": scores["loss"]}
        return better

    def _content(self, step: Step, progress: Progress) -> dict:
        """Everything that a run goes on from, each tensor once."""
        stage, networks = step.stage, to_mapping(self.config.networks)
        content = {
            "networks": json.dumps(networks, sort_keys=True),
            "codec": stage.networks(stage.trained.state_dict()),
            "averages": stage.networks(step.averages.average),
            "training": step.state_dict(),
            "best": self.best,
            "position": self.position,
            "seconds": progress.seconds,
        }
        return content | {name: getattr(self.codec, name).state_dict() for name in stage.frozen}

    def _save(self, step: Step, progress: Progress, better: bool = False, finished: bool = False) -> None:
        """Write a checkpoint, then remove those that need not stay; every rank waits for it.

        Args:
            better: the weights are the best so far. finished: the stage is done with, not only all its iterations.
        Raises:
            DiffoError: it cannot be written; the one before is whole.
        """
        told = None
        if distributed.is_main():
            point, content = Point(step.stage.name, progress.step), self._content(step, progress)
            try:
                if better or finished:  # first: a run that is killed in between has no checkpoint without its averages
                    frozen = {name: content[name] for name in step.stage.frozen}  # each its own average
                    self.checkpoints.save_averages(point, content["averages"] | frozen, self.config.networks)
                self.checkpoints.save(point, content | {"finished": finished})
                self.checkpoints.prune(self.best)
                self.log.say(f"stage {point.stage}: saved iteration {point.step}")
            except DiffoError as error:
                told = f"stage {point.stage}, iteration {point.step} is not saved: {error}"
        told = next(filter(None, distributed.gather_objects(told)), None)
        if told:
            raise DiffoError(f"{told}. Mend that and go on with --resume {self.folder}")

    def _failed(self, step: Step, progress: Progress, error: NotFinite) -> DiffoError:
        """Keep the state that a step or a validation failed in, apart from the checkpoints. All ranks come here."""
        path, told = self.folder / FAILED, ""
        if distributed.is_main():
            try:
                about = {"stage": step.stage.name, "step": progress.step, "failed": str(error)}
                checkpoints.save(path, about | self._content(step, progress))
            except DiffoError as unwritten:
                told = f" (not written: {unwritten})"
        distributed.gather_objects(None)  # a rank that ends has the others stopped
        going_on = f"; the last checkpoint is as it was (--resume {self.folder})" if self.checkpoints.points() else ""
        return NotFinite(f"{error}. The state then is kept in {path}{told}{going_on}")

    def _resume(self) -> tuple[int, dict]:
        """The stage to go on with, by number, and the checkpoint's content, {} at its beginning; networks are as saved there.

        Raises:
            CheckpointError: ranks see different checkpoints.
        """
        stages = list(self.config.stages)
        saved, refused = self.checkpoints.newest()
        seen = distributed.gather_objects(saved and (saved["stage"], saved["step"]))  # before anything is removed
        if len(set(seen)) > 1:
            raise CheckpointError(f"{self.folder}: ranks see different newest checkpoints ({seen}): is it shared?")
        for reason in refused.values():
            self.log.say(f"passed over: {reason}")
        if distributed.is_main():
            self.checkpoints.set_aside(refused)
            self.checkpoints.remove_unfinished()
        if saved is None:
            self.log.keep_until(stages[0], 0, stages)
            for told in self.started_from:
                self.log.say(told)
            return 0, {}
        where = f"{self.folder}, {saved['stage']} {saved['step']}"
        if saved["stage"] == "gt":  # what stage codec starts from is not in it
            start_from(replace(self.config, autoencoder=None, stages=("gt",)), self.codec)
        require_same(self.config.networks, stored_params(saved["networks"], where), f"{where}: of other networks")
        frozen = {name: saved[name] for name in NETWORKS if name in saved}
        for name, state in (saved.pop("codec") | frozen).items():
            checkpoints.load_strictly(getattr(self.codec, name), state, where)
        self.best = saved["best"]
        if distributed.is_main():
            self.checkpoints.prune(self.best)  # it may have been killed before it did
        self.log.keep_until(saved["stage"], saved["step"], stages)
        self.log.say(f"resumed after {saved['stage']} {saved['step']}: {' '.join(sys.argv[1:])}")
        return self._next(saved, where)

    def _next(self, saved: dict, where: str) -> tuple[int, dict]:
        """The stage that a checkpoint goes on with: its own, unless that is finished."""
        name, index = saved["stage"], self.config.stages.index(saved["stage"])
        progress = Progress(getattr(self.config, name), saved["step"], saved["seconds"])
        if not saved["finished"] or not (progress.done or STAGES[name].finishes):
            return index, saved
        if not progress.done and name == self.config.stages[-1]:
            raise CheckpointError(
                f"{where}: stage {name} has ended there, and what ends it cannot be taken back: to train it for longer, "
                "train anew under another name=..."
            )
        return index + 1, {}
