"""The log of a training run: JSON lines, TensorBoard events, a log file and one line per event."""

import json
import logging
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor

from utils.files import atomic_write, make_folder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter  # takes seconds

METRICS, VALIDATION, TENSORBOARD, LOG = "metrics.jsonl", "validation.jsonl", "tensorboard", "train.log"


class Unbroken:
    """A text stream whose reader may go, or disk fill up, without ending the work that tells something there."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:  # nothing is kept: Python would meet it again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except OSError:
            pass
        return len(text)

    def flush(self) -> None:
        """Everything is written out at once."""


class RunLog:
    """Written by the main process alone; on other ranks every call does nothing.

    What cannot be written raises OSError, which ends a run in one line.
    """

    def __init__(self, folder: Path, main: bool):
        self.main = main
        if not main:
            return
        self.folder = make_folder(folder)
        self.boards: dict[str, SummaryWriter] = {}  # by the folder of their events
        self.logger = logging.getLogger("diffo.train")
        self.logger.setLevel(logging.INFO)
        self.logger.handlers.clear()
        self.logger.propagate = False
        file = logging.FileHandler(folder / LOG)
        file.handleError = lambda record: None  # a full disk: the terminal has the message too
        for handler, time in ((file, "%Y-%m-%d %H:%M:%S"), (logging.StreamHandler(Unbroken(sys.stderr)), "%H:%M:%S")):
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", time))
            self.logger.addHandler(handler)

    def say(self, message: str) -> None:
        if self.main:
            self.logger.info(message)

    def begin(self, stage: str, step: int) -> None:
        """A stage starts, or goes on, after `step` iterations: TensorBoard hides what it has of later ones."""
        if self.main:
            from torch.utils.tensorboard import SummaryWriter

            # One folder each: what is hidden is hidden of a whole folder, and validations are counted from 1.
            for name, first in ((stage, step), (f"{stage}-validation", step + 1)):
                self.boards[name] = SummaryWriter(self.folder / TENSORBOARD / name, purge_step=first)

    def keep_until(self, stage: str, step: int, stages: list[str]) -> None:
        """Drop what the files say of iterations after `step`, those done, of a stage: a resumed run writes it again."""
        order = {stage: i for i, stage in enumerate(stages)}  # a stage that is no longer run comes first
        for name, last in ((METRICS, step - 1), (VALIDATION, step)):  # counted from 0, and by iterations done
            if not self.main or not (path := self.folder / name).exists():
                continue
            kept = []
            for line in path.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # a line cut by the crash
                    entry = json.loads(line)
                    if (order.get(entry["stage"], -1), entry["step"]) <= (order[stage], last):
                        kept.append(line)
            atomic_write(path, "".join(f"{line}\n" for line in kept).encode())

    def step(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One line `{"stage", "step", "loss", ...}` in metrics.jsonl, and the same scalars for TensorBoard."""
        self._write(METRICS, stage, step, values)

    def validation(self, stage: str, done: int, values: dict[str, float], rows: list[Tensor]) -> None:
        """One line in validation.jsonl, after `done` iterations; scalars and pictures for TensorBoard."""
        self.say(f"stage {stage}, iteration {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
        self._write(VALIDATION, stage, done, values, "-validation")
        self.pictures(stage, done, rows, "-validation")

    def _write(self, file: str, stage: str, step: int, values: dict[str, float], group: str = "") -> None:
        if not self.main:
            return
        with open(self.folder / file, "a") as lines:
            lines.write(json.dumps({"stage": stage, "step": step} | values) + "\n")
        for name, value in values.items():
            if math.isfinite(value):
                self.boards[stage + group].add_scalar(f"{stage}/{name}", value, step)

    def pictures(self, stage: str, step: int, rows: list[Tensor], group: str = "") -> None:
        """A grid, one row per tensor (N x 3 x H x W in [-1, 1]): originals above, results below."""
        if self.main and rows:
            grid = torch.cat([torch.cat(list(row[:4]), dim=2) for row in rows], dim=1)
            self.boards[stage + group].add_image(f"{stage}/pictures", ((grid.float() + 1) / 2).clamp(0, 1), step)

    def close(self) -> None:
        if self.main:
            for board in self.boards.values():
                board.close()
