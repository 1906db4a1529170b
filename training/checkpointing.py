"""Checkpoints of a run: the last few and the best, one file each, and the averaged triples of the best and the last.

`checkpoints/<stage>_<iteration>.pth` holds everything that a run goes on from, each tensor once; it is written to a
temporary name and renamed, so it is complete or absent. `ema_ckpts` holds averaged weights under the published names.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.records import CodecParams
from models.released import NAMES, Triple, save_triple
from utils import checkpoints
from utils.errors import CheckpointError
from utils.files import atomic_write, make_folder, remove_leftovers

CHECKPOINTS, AVERAGES, BEST = "checkpoints", "ema_ckpts", "best.json"


@dataclass(frozen=True)
class Point:
    """Where a run stands: iterations done of a stage."""

    stage: str
    step: int


class Checkpoints:
    """The checkpoints in a run's folder; `stages` in the order in which they are run."""

    def __init__(self, folder: Path, stages: Sequence[str], keep_last: int):
        self.folder, self.stages, self.keep_last = folder, list(stages), keep_last

    def path(self, point: Point) -> Path:
        return self.folder / CHECKPOINTS / f"{point.stage}_{point.step}.pth"

    def points(self) -> list[Point]:
        """Those that are there, the newest last.

        Raises:
            CheckpointError: one of a stage that the configuration does not have.
        """
        found = []
        for path in (self.folder / CHECKPOINTS).glob("*_*.pth"):
            stage, _, step = path.stem.partition("_")
            if stage not in self.stages or not step.isdecimal():
                raise CheckpointError(f"{path}: of a stage that the configuration does not have")
            found.append(Point(stage, int(step)))
        return sorted(found, key=lambda point: (self.stages.index(point.stage), point.step))

    def newest(self) -> tuple[dict | None, dict[Point, str]]:
        """Content of the newest checkpoint that can be read, None if there is none; newer ones, and why they will not do.

        Raises:
            CheckpointError: there are checkpoints, and not one can be read.
        """
        refused: dict[Point, str] = {}
        for point in reversed(self.points()):
            try:
                content = checkpoints.read(self.path(point))
                if "stage" not in content:
                    raise CheckpointError(f"{self.path(point)}: not a checkpoint of a run")
                return content, refused
            except CheckpointError as error:
                refused[point] = str(error)
        if refused:
            raise CheckpointError(
                f"{self.folder}: no readable checkpoint to go on from ({'; '.join(refused.values())})"
            )
        return None, refused

    def save(self, point: Point, content: dict) -> None:
        """Write a checkpoint: tensors and plain values. Raises DiffoError; an older one stays whole then."""
        make_folder(self.folder / CHECKPOINTS)
        checkpoints.save(self.path(point), {"stage": point.stage, "step": point.step} | content)

    def save_averages(self, point: Point, averages: dict[str, dict[str, Tensor]], params: CodecParams) -> None:
        """Write averaged weights, state dicts by network, under the published names; in stage `gt` the autoencoder alone,
        in stage `light`, whose decoder has no published name, nothing."""
        if point.stage == "gt":
            (path,) = self._averages(point)
            make_folder(path.parent)
            checkpoints.save(path, {"state_dict": averages["autoencoder"]})
        elif point.stage != "light":
            save_triple(Triple.of(make_folder(self.folder / AVERAGES), point.step), averages, params)

    def _averages(self, point: Point) -> list[Path]:
        """Files of a point's averages, there or not."""
        if point.stage == "gt":  # apart: D may go on learning in stage codec, which counts its iterations anew
            return [Triple.of(self.folder / AVERAGES / "gt", point.step).autoencoder]
        return [] if point.stage == "light" else list(vars(Triple.of(self.folder / AVERAGES, point.step)).values())

    def prune(self, best: dict | None) -> None:
        """Remove all but the last few of the present stage, its best and the last of every earlier stage.

        Args:
            best: "stage", "step" and "loss" of the stage's best checkpoint by validation, which best.json names; None
                where there has been no validation.
        """
        points = self.points()
        stage = points[-1].stage
        last = list({point.stage: point for point in points}.values())
        chosen = [Point(stage, best["step"])] if best and best["stage"] == stage else []
        for point in set(points) - {*[p for p in points if p.stage == stage][-self.keep_last :], *last, *chosen}:
            self.path(point).unlink()
        wanted = {path for point in (*last, *chosen) for path in self._averages(point)}
        for path in {
            path for name in NAMES.values() for path in (self.folder / AVERAGES).rglob(name.format("*"))
        } - wanted:
            path.unlink()
        if best:
            atomic_write(self.folder / BEST, (json.dumps(best) + "\n").encode())
        else:
            (self.folder / BEST).unlink(missing_ok=True)

    def set_aside(self, points: Iterable[Point]) -> None:
        """Damaged checkpoints no longer count; they stay under another name."""
        for point in points:
            self.path(point).replace(self.path(point).with_suffix(".damaged"))

    def remove_unfinished(self) -> None:
        """Remove temporary files that a killed process was writing."""
        for sub in ("", CHECKPOINTS, AVERAGES, f"{AVERAGES}/gt"):
            remove_leftovers(self.folder / sub)


def is_run(folder: Path) -> bool:
    """Whether a run has saved something in a folder."""
    return any((folder / CHECKPOINTS).glob("*.pth"))
