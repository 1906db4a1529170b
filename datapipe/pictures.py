"""Pictures from a folder -> an endless stream of crops in [-1, 1].

Position p of the stream, counted over all ranks from the start of training, gives the picture (p mod n in the
shuffled order of epoch p // n) and every random choice made about it. So a run can stop and go on anywhere, and the
same run on another number of processes sees the same crops.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.errors import ConfigError, DiffoError, PictureError
from utils.images import find_pictures, read_image, to_signed

EPOCH, CROP, DRAWS, REVIVAL = range(4)  # independent random streams of one seed


def generator(seed: int, purpose: int, position: int) -> np.random.Generator:
    """The random numbers of one purpose at one position, the same on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose, position])))


@dataclass(frozen=True)
class DataParams:
    """Where the training pictures are and how crops are cut from them.

    Attributes:
        folder: pictures, sub-folders included; None trains on the demo photographs.
        crop: `random`: a random square of the picture, enlarged at random by a factor in `enlarge`;
            `square`: a random square of the whole short side, area-resized (the published code's way).
        flip: mirror half of the crops.
        workers: processes that decode; 0 decodes in the training process.
    """

    folder: str | None = None
    crop: Literal["random", "square"] = "random"
    enlarge: tuple[float, ...] = (1.0, 1.0)
    flip: bool = True
    workers: int = 4

    def __post_init__(self):
        if len(self.enlarge) != 2 or not 0 < self.enlarge[0] <= self.enlarge[1]:
            raise ValueError(f"enlarge {self.enlarge}: two factors above 0, the smaller first")
        if self.workers < 0:
            raise ValueError(f"workers {self.workers}: from 0 up")


def demo_photographs() -> list[Path]:
    """Natural photographs that scikit-image ships, for trying things out without any data.

    Raises:
        DiffoError: scikit-image is not installed.
    """
    found = find_spec("skimage")
    if found is None:
        raise DiffoError("the demo photographs come with scikit-image: pip install scikit-image, or name your own")
    folder = Path(found.origin).parent / "data"
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
    return [folder / name for name in names if (folder / name).is_file()]


class Pictures(Dataset):
    """Item p is (crop at position p, float32 3 x size x size in [-1, 1]; p)."""

    def __init__(self, params: DataParams, size: int, seed: int):
        self.params, self.size, self.seed = params, size, seed
        self.files = find_pictures(Path(params.folder), recursive=True) if params.folder else demo_photographs()
        if not self.files:
            raise ConfigError(f"{params.folder or 'scikit-image'}: no pictures there to train on")
        self._picture(0)  # a folder without one readable picture is refused here, not in a worker

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        random = generator(self.seed, CROP, position)
        crop = self._square if self.params.crop == "square" else self._random
        picture = crop(self._picture(position)[None], random)[0]
        if self.params.flip and random.random() < 0.5:
            picture = picture.flip(2)
        return picture.clamp(-1, 1), position

    def _picture(self, position: int) -> Tensor:
        """The picture at a position, or the next readable one of that epoch's order: 3 x H x W in [-1, 1]."""
        n = len(self.files)
        order = epoch_order(self.seed, position // n, n)
        for offset in range(n):
            path = self.files[order[(position + offset) % n]]
            try:
                return to_signed(read_image(path))
            except PictureError as error:
                print_once(f"skipped: {error}")
        raise ConfigError(f"{self.params.folder}: not one picture there can be read")

    def _random(self, picture: Tensor, random: np.random.Generator) -> Tensor:
        low, high = self.params.enlarge
        factor = low * (high / low) ** random.random()
        height, width = picture.shape[2:]
        factor = max(factor, self.size / min(height, width))
        if factor > 1:
            target = [max(self.size, round(side * factor)) for side in (height, width)]
            picture = F.interpolate(picture, size=target, mode="bicubic", align_corners=False)
        top, left = (int(random.integers(0, side - self.size + 1)) for side in picture.shape[2:])
        return picture[:, :, top : top + self.size, left : left + self.size]

    def _square(self, picture: Tensor, random: np.random.Generator) -> Tensor:
        side = min(picture.shape[2:])
        top, left = (int(random.integers(0, s - side + 1)) for s in picture.shape[2:])
        square = picture[:, :, top : top + side, left : left + side]
        return F.interpolate(square, size=(self.size, self.size), mode="area")


class Positions(Sampler[list[int]]):
    """Batches of stream positions of one rank, without end: step s holds (s*B + i) * world + rank for i in 0..B-1."""

    def __init__(self, batch: int, rank: int, world: int, first_step: int):
        self.batch, self.rank, self.world, self.first_step = batch, rank, world, first_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            start = step * self.batch * self.world + self.rank
            yield [start + i * self.world for i in range(self.batch)]
            step += 1


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return generator(seed, EPOCH, epoch).permutation(n)


@cache
def print_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def stream(pictures: Pictures, batch: int, rank: int, world: int, first_step: int) -> DataLoader:
    """Batches (N x 3 x size x size in [-1, 1], positions (N,)) from `first_step` on."""
    workers = pictures.params.workers
    return DataLoader(
        pictures,
        batch_sampler=Positions(batch, rank, world, first_step),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
