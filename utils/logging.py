"""What a training run leaves behind: metrics.jsonl, TensorBoard events, a log file and one line per event."""

import json
import logging
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from utils.files import atomic_write, make_folder


class RunLog:
    """Written by the main process alone; on other ranks every call does nothing."""

    def __init__(self, folder: Path, main: bool):
        self.main = main
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter

        make_folder(folder)
        self.folder = folder
        self.board = SummaryWriter(folder / "tensorboard")
        self.logger = logging.getLogger("diffo.train")
        self.logger.setLevel(logging.INFO)
        self.logger.handlers.clear()
        self.logger.propagate = False
        for handler in (logging.FileHandler(folder / "train.log"), logging.StreamHandler(sys.stderr)):
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            self.logger.addHandler(handler)

    def say(self, message: str) -> None:
        if self.main:
            self.logger.info(message)

    def keep_until(self, stage: str, step: int, stages: list[str]) -> None:
        """Drop lines of metrics.jsonl at or after (stage, step): a resumed run writes them again."""
        path = self.folder / "metrics.jsonl" if self.main else None
        if path is None or not path.exists():
            return
        order = {name: i for i, name in enumerate(stages)}  # a stage that is no longer run comes first
        kept = []
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # a line cut by the crash
                continue
            if (order.get(entry["stage"], -1), entry["step"]) < (order[stage], step):
                kept.append(line)
        atomic_write(path, "".join(f"{line}\n" for line in kept).encode())

    def step(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One line `{"stage", "step", "loss", ...}`, and the same scalars for TensorBoard."""
        if not self.main:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "step": step} | values) + "\n")
        for name, value in values.items():
            if math.isfinite(value):
                self.board.add_scalar(f"{stage}/{name}", value, step)

    def pictures(self, stage: str, step: int, rows: list[Tensor]) -> None:
        """A grid, one row per tensor (N x 3 x H x W in [-1, 1]): originals above, results below."""
        if self.main:
            grid = torch.cat([torch.cat(list(row[:4]), dim=2) for row in rows], dim=1)
            self.board.add_image(f"{stage}/pictures", ((grid.float() + 1) / 2).clamp(0, 1), step)

    def close(self) -> None:
        if self.main:
            self.board.close()
