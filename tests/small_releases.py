"""Releases of the smallest networks, and pictures, for the commands of reproduce.py."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import torch

from models.codec import Codec
from models.entropy_coding import frequency_table
from release.making import write_release
from release.tables import Counts
from reproduce import main
from tests.commands import NANO, photograph
from tests.networks import off_zero
from tests.residual import new_codec
from training.config import load_config

SCORES = ("psnr", "psnr_red")


def two_layers(folder: Path) -> Path:
    """A release with a residual codec."""
    codec = new_codec()
    write_release(folder, 3, codec, replace(load_config(str(NANO)), networks=codec.params), counted_indices=7)
    return folder


def base_alone(folder: Path, *overrides: str) -> Path:
    """A release without one, of random weights."""
    config = load_config(str(NANO), [f"name={folder.name}", *overrides])
    codec = Codec(config.networks)
    off_zero(codec)
    codec.base_table = frequency_table(Counts.none(codec).base)
    write_release(folder, 3, codec, config)
    return folder


def larger_base(folder: Path) -> Path:
    """A release of the base alone, with a larger code book."""
    torch.manual_seed(1)
    return base_alone(folder, "networks.vq_base.codebook_size=2048")


def two_photographs(folder: Path) -> Path:
    for i in range(2):
        photograph(folder / f"{i}.png", 96, 80, seed=i)
    return folder


def reproduce(*args: object) -> int:
    """The exit status of reproduce.py, in this process, on the CPU."""
    try:
        return main([*map(str, args), "--device", "cpu"])
    except SystemExit as stop:
        return stop.code


def rows_in(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def told_in(path: Path) -> dict:
    return json.loads(path.read_text())
