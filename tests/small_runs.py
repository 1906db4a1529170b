"""Runs of the nano configuration in processes of their own or in this one, and what they leave."""

import json
import os
import sys
from pathlib import Path

import torch

from tests.commands import NANO

SETTINGS = (
    "save_every=1",
    "keep_last=2",
    "gt.iterations=4",
    "codec.iterations=6",
    "gt.statistics=2",
    "gt.adversary.weight=0",
)


def train(args: list[str]) -> None:
    """In a process of its own: the command, silent."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    from main_diffusion_train_vq import main

    sys.exit(main(args))


def command(data: Path, save_dir: Path) -> list[str]:
    validation = (f"validation.folder={data}", "validation.every=2", "validation.limit=2")
    return ["--cfg_path", str(NANO), "--save_dir", str(save_dir), "--data", str(data), *SETTINGS, *validation]


def lines(folder: Path, name: str) -> list[dict]:
    """Logged numbers without the times."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "pictures_per_second"} for entry in found]


def tree(folder: Path) -> set[str]:
    """Files of a run, hidden ones too, without the log's."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if path.parts[0] != "tensorboard"}


def interrupted(data: Path, save_dir: Path, monkeypatch, *options: str) -> Path:
    """A run that is stopped before its third iteration of stage gt; its folder."""
    from main_diffusion_train_vq import main
    from training.gt_stage import GtStage

    plain = GtStage.step

    def step(self, image, positions, step):
        if step == 2:
            raise KeyboardInterrupt
        return plain(self, image, positions, step)

    with monkeypatch.context() as patch:
        patch.setattr(GtStage, "step", step)
        main([*command(data, save_dir), *options])
    return save_dir / "nano"
