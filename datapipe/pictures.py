"""Pictures of a source -> an endless stream of crops in [-1, 1].

Position p of the stream, counted over all ranks from the start of training, gives the picture (p mod n in the
shuffled order of epoch p // n) and every random choice made about it. So a run can stop and go on anywhere, and the
same run on another number of processes sees the same crops.
"""

import multiprocessing.util
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datapipe.draws import CROP, EPOCH, generator
from datapipe.source import Source
from datapipe.sources import KINDS, Paths, open_source
from utils.errors import ConfigError, PictureError
from utils.images import to_signed
from utils.stopping import end_children_at_exit, signals_held, stop_for_parent_only

LOST = "DataLoader worker (pid"  # how PyTorch begins to report it
TRIED = 100  # pictures in a row that may be unreadable


@dataclass(frozen=True)
class DataParams:
    """Where the training pictures are and how crops are cut from them.

    One of `folder`, `txt_file_path` and `shards` may be set, to one path or a list of them; without any, the demo
    photographs are used.

    Attributes:
        folder: pictures, sub-folders included.
        txt_file_path: text lists, one picture a line, absolute or relative to the list's folder.
        shards: WebDataset tars with their indexes, folders of them, or patterns such as `set-{000..127}.tar`.
        crop: `random`: a random square of the picture, enlarged at random by a factor in `enlarge`;
            `square`: a random square of the whole short side, area-resized (the published code's way).
        flip: mirror half of the crops.
        workers: processes that decode; 0 decodes in the training process.
    """

    folder: Paths = None
    txt_file_path: Paths = None
    shards: Paths = None
    crop: Literal["random", "square"] = "random"
    enlarge: tuple[float, ...] = (1.0, 1.0)
    flip: bool = True
    workers: int = 4

    def __post_init__(self):
        named = [key for key in KINDS if getattr(self, key)]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} are both set: pictures come from one of {', '.join(KINDS)}")
        if len(self.enlarge) != 2 or not 0 < self.enlarge[0] <= self.enlarge[1]:
            raise ValueError(f"enlarge {self.enlarge}: two factors above 0, the smaller first")
        if self.workers < 0:
            raise ValueError(f"workers {self.workers}: from 0 up")


class Batch(NamedTuple):
    """Crops and their positions in the stream: image N x 3 x size x size in [-1, 1], position int64 (N,)."""

    image: Tensor
    position: Tensor


class Pictures(Dataset):
    """Item p is (crop at position p, float32 3 x size x size in [-1, 1]; p).

    Args:
        source: where the pictures come from, opened already; by default what `params` names.
    Raises:
        DiffoError: the source cannot be opened, or the first pictures in order are all unreadable.
    """

    def __init__(self, params: DataParams, size: int, seed: int, source: Source | None = None):
        self.params, self.size, self.seed = params, size, seed
        self.source = source or open_source(params.folder, params.txt_file_path, params.shards)
        self._picture(0)  # a source without one readable picture is refused here, not in a worker

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        random = generator(self.seed, CROP, position)
        crop = self._square if self.params.crop == "square" else self._random
        picture = crop(self._picture(position)[None], random)[0]
        if self.params.flip and random.random() < 0.5:
            picture = picture.flip(2)
        return picture.clamp(-1, 1), position

    def _picture(self, position: int) -> Tensor:
        """The picture at a position, or the next readable one of that epoch's order: 3 x H x W in [-1, 1]."""
        n = len(self.source)
        order = epoch_order(self.seed, position // n, n)
        for offset in range(min(n, TRIED)):
            index = int(order[(position + offset) % n])
            try:
                return to_signed(self.source.read(index))
            except PictureError as error:
                self.source.mark_unreadable(index)
                last = error
        raise ConfigError(f"{self.source.name}: {min(n, TRIED)} pictures in a row cannot be read, the last: {last}")

    def _random(self, picture: Tensor, random: np.random.Generator) -> Tensor:
        low, high = self.params.enlarge
        factor = low * (high / low) ** random.random()
        height, width = picture.shape[2:]
        factor = max(factor, self.size / min(height, width))
        enlarged = [max(self.size, round(side * factor)) for side in (height, width)] if factor > 1 else (height, width)
        top, left = (int(random.integers(0, side - self.size + 1)) for side in enlarged)
        if factor > 1:
            return enlarged_crop(picture, enlarged, top, left, self.size)
        return picture[:, :, top : top + self.size, left : left + self.size]

    def _square(self, picture: Tensor, random: np.random.Generator) -> Tensor:
        side = min(picture.shape[2:])
        top, left = (int(random.integers(0, s - side + 1)) for s in picture.shape[2:])
        square = picture[:, :, top : top + side, left : left + side]
        return F.interpolate(square, size=(self.size, self.size), mode="area")


class Positions(Sampler[list[int]]):
    """Batches of stream positions of one rank, without end: step s holds first + (s*B + i) * world + rank, i in 0..B-1."""

    def __init__(self, batch: int, rank: int, world: int, first: int):
        self.batch, self.rank, self.world, self.first = batch, rank, world, first

    def __iter__(self) -> Iterator[list[int]]:
        start = self.first + self.rank
        while True:
            yield [start + i * self.world for i in range(self.batch)]
            start += self.batch * self.world


def enlarged_crop(picture: Tensor, enlarged: Sequence[int], top: int, left: int, size: int) -> Tensor:
    """A square of a picture as bicubic interpolation to `enlarged` (rows, columns) shows it; the rest is never computed.

    Args:
        picture: 1 x C x H x W. top, left: of the square, in pixels of the enlarged picture; size: its side.
    """
    axes = []
    for start, side in ((left, enlarged[1]), (top, enlarged[0])):
        centre = torch.arange(start, start + size, dtype=torch.float64) + 0.5
        axes.append((2 * centre / side - 1).float())  # -1 and 1 are the outer edges of the picture
    grid = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1)[None]  # 1 size size (x, y)
    return F.grid_sample(picture, grid, mode="bicubic", padding_mode="border", align_corners=False)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n pictures in an epoch: a permutation, int64 (n,)."""
    return generator(seed, EPOCH, epoch).permutation(n)


def stream(pictures: Pictures, batch: int, rank: int, world: int, first: int, pinned: bool = False) -> Iterator[Batch]:
    """Batches from position `first` of the stream on, without end.

    Args:
        pinned: in memory that CUDA copies from while it computes.
    """
    workers = pictures.params.workers
    if workers:
        # Each would make a folder of its own there for its pictures' socket, and wait in silence if the disk is full.
        multiprocessing.util.get_temp_dir()
        end_children_at_exit()
    loader = DataLoader(
        pictures,
        batch_sampler=Positions(batch, rank, world, first),
        num_workers=workers,
        pin_memory=pinned,
        worker_init_fn=stop_for_parent_only,
    )
    with signals_held():
        batches = iter(loader)
    try:
        yield from (Batch(*crops) for crops in batches)
    except ConfigError as error:
        # From a worker it comes as the worker's whole traceback, of which the last line is "class: message".
        message = str(error) if workers == 0 else str(error).rstrip().rpartition("\n")[2].partition(": ")[2]
        raise ConfigError(message) from None
    except (EOFError, ConnectionError) as error:  # a killed worker's pipe may end before PyTorch reports the worker
        time.sleep(1)  # the report comes by a signal, as a RuntimeError from here
        raise RuntimeError(f"{LOST}) has closed its pipe") from error


_kept: list[BaseException] = []


def lost_worker(error: BaseException) -> str | None:
    """How a decoding process was lost, in a line, if an error says so; it may come at any moment, not only when one reads.

    It is a worker that the system has killed, or that finds no room in shared memory for its pictures. The error, and
    with it the stream, is kept until the process ends: closing the stream takes a lock that the lost worker may have held.
    """
    told = str(error)
    last = (told.splitlines() or [""])[-1].strip()
    lost = told.startswith(LOST) or ("DataLoader worker process" in told and "shared memory" in last)
    if not (isinstance(error, RuntimeError) and lost):
        return None
    _kept.append(error)
    return last
