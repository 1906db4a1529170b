"""Checkpoints of a run: complete or absent, the last few and the best.

A checkpoint is the weights in `ckpts` and their averages in `ema_ckpts`, under published names, and the state that a run
goes on from, `states/<stage>_<iteration>.pth`. The state is written last and lists the others, so that what is cut short
is no checkpoint; a marker tells the next start what to remove then.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from models.records import CodecParams
from models.released import Triple, save_triple
from utils import checkpoints
from utils.errors import CheckpointError
from utils.files import atomic_write, make_folder, remove_leftovers

STATES, BEST = "states", "best.json"
AVERAGES = "ema_ckpts"
PREFIXES = {"ckpts": "", AVERAGES: "ema_"}  # of the UNet's file, by folder
Weights = dict[str, dict[str, Tensor]]  # state dicts by network


@dataclass(frozen=True)
class Point:
    """Where a run stands: iterations done of a stage."""

    stage: str
    step: int


class Checkpoints:
    """The checkpoints in a run's folder; `stages` in the order in which they are run."""

    def __init__(self, folder: Path, stages: Sequence[str], keep_last: int):
        self.folder, self.stages, self.keep_last = folder, list(stages), keep_last

    def points(self) -> list[Point]:
        """Those whose state is there, the newest last.

        Raises:
            CheckpointError: a state is of a stage that the configuration does not have.
        """
        found = []
        for path in (self.folder / STATES).glob("*_*.pth"):
            stage, _, step = path.stem.partition("_")
            if stage not in self.stages or not step.isdecimal():
                raise CheckpointError(f"{path}: of a stage that the configuration does not have")
            found.append(Point(stage, int(step)))
        return sorted(found, key=lambda point: (self.stages.index(point.stage), point.step))

    def newest(self) -> tuple[dict | None, dict[Point, str]]:
        """The state of the newest complete checkpoint, None if there is none; newer ones, and why they will not do.

        Raises:
            CheckpointError: there are checkpoints, and not one is complete.
        """
        refused = {}
        for point in reversed(self.points()):
            try:
                state = checkpoints.read(self._state(point))
                self._require_files(state, point)
                return state, refused
            except CheckpointError as error:
                refused[point] = str(error)
        if refused:
            raise CheckpointError(
                f"{self.folder}: no complete checkpoint to go on from ({'; '.join(refused.values())})"
            )
        return None, refused

    def _require_files(self, state: dict, point: Point) -> None:
        if "files" not in state:
            raise CheckpointError(f"{self._state(point)}: not a training state")
        for name, size in state["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise CheckpointError(f"{self._state(point)}: {name}, which belongs to it, is not there or not whole")

    def save(self, point: Point, weights: Weights, averages: Weights, params: CodecParams, state: dict) -> None:
        """Write a checkpoint. Raises DiffoError and DiskFull; there is no checkpoint of that point then.

        Args:
            state: what the run needs to go on, tensors and plain values.
        """
        for sub in (STATES, *PREFIXES):
            make_folder(self.folder / sub)
        there = self._earlier(point)
        self._state(point).unlink(missing_ok=True)  # of an abandoned course: it must not vouch for other weights
        atomic_write(self._marker(point), b"")
        try:
            for sub, states in zip(PREFIXES, (weights, averages), strict=True):
                triple = self._triple(sub, point.step)
                if point.stage == "gt":
                    checkpoints.save(triple.autoencoder, {"state_dict": states["autoencoder"]})
                else:
                    shared = triple.autoencoder in there and _holds(triple.autoencoder, states["autoencoder"])
                    save_triple(triple, states, params, keep={triple.autoencoder} if shared else ())
            files = {str(path.relative_to(self.folder)): path.stat().st_size for path in self._files(point)}
            about = {"stage": point.stage, "step": point.step, "files": files}
            checkpoints.save(self._state(point), about | state)
        except BaseException:
            self.remove_unfinished()  # it may be what fills the disk
            raise
        self._marker(point).unlink()

    def _earlier(self, point: Point) -> set[Path]:
        """Files of the last checkpoint of the stages before, which a checkpoint of this one may share and must not touch.

        The last iteration of `gt` and the same one of `codec` name one autoencoder, and it is one (`_holds`): `codec`
        leaves it alone. Checkpoints of `gt` before its last hold others, so they go first.
        """
        points = self.points()
        before = [p for p in points if self.stages.index(p.stage) < self.stages.index(point.stage)]
        last = list({p.stage: p for p in before}.values())
        kept = last + [p for p in points if p.stage == point.stage]
        for superseded in before:
            if superseded not in last:
                self._remove(superseded, kept)
        return {path for p in last for path in self._files(p)}

    def keep(self, best: dict | None) -> None:
        """Remove all but the last few of the present stage, its best and the last of every earlier stage.

        Args:
            best: "stage", "step" and "loss" of the stage's best checkpoint by validation, which best.json names; None
                where there has been no validation.
        """
        points = self.points()
        stage = points[-1].stage
        kept = [point for point in points if point.stage == stage][-self.keep_last :]
        kept += {point.stage: point for point in points if point.stage != stage}.values()
        if best and best["stage"] == stage:
            kept.append(Point(stage, best["step"]))
        for point in points:
            if point not in kept:
                self._remove(point, kept)
        if best:
            atomic_write(self.folder / BEST, (json.dumps(best) + "\n").encode())
        else:
            (self.folder / BEST).unlink(missing_ok=True)

    def set_aside(self, points: Iterable[Point]) -> None:
        """What is not complete no longer counts as a checkpoint; its state stays under another name."""
        for point in points:
            self._state(point).replace(self._state(point).with_suffix(".incomplete"))

    def remove_unfinished(self) -> None:
        """Remove what a killed process was writing."""
        for path in (self.folder / STATES).glob(".*.begun"):
            stage, _, step = path.stem.removeprefix(".").partition("_")
            point = Point(stage, int(step))
            points = self.points()
            if point not in points:
                self._remove(point, points)
            path.unlink()
        for sub in ("", STATES, *PREFIXES):
            remove_leftovers(self.folder / sub)

    def _remove(self, point: Point, kept: list[Point]) -> None:
        """The state goes last: without its files it counts as incomplete, and is removed the next time."""
        shared = {path for other in kept for path in self._files(other)}
        for path in self._files(point):
            if path not in shared:
                path.unlink(missing_ok=True)
        self._state(point).unlink(missing_ok=True)

    def _triple(self, sub: str, step: int) -> Triple:
        triple = Triple.of(self.folder / sub, step)
        return replace(triple, unet=triple.unet.with_name(f"{PREFIXES[sub]}model_{step}.pth"))

    def _files(self, point: Point) -> list[Path]:
        triples = [self._triple(sub, point.step) for sub in PREFIXES]
        if point.stage == "gt":
            return [triple.autoencoder for triple in triples]
        return [path for triple in triples for path in vars(triple).values()]

    def _state(self, point: Point) -> Path:
        return self.folder / STATES / f"{point.stage}_{point.step}.pth"

    def _marker(self, point: Point) -> Path:
        return self.folder / STATES / f".{point.stage}_{point.step}.begun"


def _holds(path: Path, state: dict[str, Tensor]) -> bool:
    """Whether a file holds these very weights: where the disk was full, an earlier stage's last ones may be missing."""
    try:
        return checkpoints.digest(checkpoints.read(path)["state_dict"]) == checkpoints.digest(state)
    except CheckpointError:
        return False


def is_run(folder: Path) -> bool:
    """Whether a run has saved something in a folder."""
    return any((folder / STATES).glob("*.pth"))
