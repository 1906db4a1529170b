"""Pictures of a source -> an endless stream of crops in [-1, 1].

Position p of the stream, counted over all ranks from the start of training, gives the picture (p mod n in the
shuffled order of epoch p // n) and every random choice made about it. So a run can stop and go on anywhere, and the
same run on another number of processes sees the same crops.
"""

import itertools
import multiprocessing.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datapipe.draws import CROP, EPOCH, DrawParams, draw, generator
from datapipe.source import Source
from datapipe.sources import KINDS, Paths, open_source
from utils.config import require, require_from
from utils.errors import ConfigError, PictureError
from utils.images import to_signed

TRIED = 100  # pictures in a row that may be unreadable
BICUBIC_MARGIN = 3  # pixels that interpolation reads beside the one below a centre: two, and one for rounding


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
        plain: share of the crops that are of one colour or a slope between two instead, which photographs hardly have.
        framed: share of the crops that end in lines of one colour, as scans of film do (`framed`).
        workers: processes that decode; 0 decodes in the training process.
    """

    folder: Paths = None
    txt_file_path: Paths = None
    shards: Paths = None
    crop: Literal["random", "square"] = "random"
    enlarge: tuple[float, ...] = (1.0, 1.0)
    flip: bool = True
    plain: float = 0.0
    framed: float = 0.0
    workers: int = 4

    def __post_init__(self):
        named = [key for key in KINDS if getattr(self, key)]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} are both set: pictures come from one of {', '.join(KINDS)}")
        good = len(self.enlarge) == 2 and 0 < self.enlarge[0] <= self.enlarge[1]
        require(good, f"enlarge {list(self.enlarge)}: two factors above 0, the smaller first")
        for name in ("plain", "framed"):
            require(0 <= getattr(self, name) <= 1, f"{name} {getattr(self, name)}: a share, from 0 to 1")
        require_from(0, self, "workers")

    @property
    def is_demo(self) -> bool:
        """Whether no pictures are named."""
        return not any(getattr(self, key) for key in KINDS)


@dataclass(frozen=True, eq=False)
class Batch:
    """Some positions of the stream.

    Attributes:
        image: crops, float32 N x 3 x S x S in [-1, 1]. position: int64 (N,), on the CPU wherever the rest is.
        draws: random numbers by name (`datapipe.draws.draw`), each with first axis N; empty where none are drawn.
    """

    image: Tensor
    position: Tensor
    draws: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, part: slice) -> "Batch":
        return self._each(lambda tensor: tensor[part])

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; without waiting for the copy where it comes from pinned memory."""
        there = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(there, position=self.position)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        draws = {name: change(tensor) for name, tensor in self.draws.items()}
        return Batch(change(self.image), change(self.position), draws)


class Pictures(Dataset):
    """Item p of the stream: `image`, float32 3 x size x size in [-1, 1]; `position`, p; and its draws by name.

    Args:
        source: where the pictures come from, opened already; by default what `params` names.
        draws: how the random numbers of a sample are drawn; None for none.
    Raises:
        DiffoError: the source cannot be opened, or the first pictures in order are all unreadable.
    """

    def __init__(
        self, params: DataParams, size: int, seed: int, source: Source | None = None, draws: DrawParams | None = None
    ):
        self.params, self.size, self.seed, self.draws = params, size, seed, draws
        self.source = source or open_source(params.folder, params.txt_file_path, params.shards)
        self._picture(0)  # a source without one readable picture is refused here, not in a worker

    def __getitem__(self, position: int) -> dict[str, Tensor | int]:
        random = generator(self.seed, CROP, position)
        if self.params.plain and random.random() < self.params.plain:
            image = plain_crop(self.size, random)
        else:
            crop = self._square if self.params.crop == "square" else self._random
            image = crop(self._picture(position), random)
        if self.params.framed and random.random() < self.params.framed:
            image = framed(image, random)
        if self.params.flip and random.random() < 0.5:
            image = image.flip(2)
        drawn = draw(self.draws, self.seed, position) if self.draws else {}
        return {"image": image.clamp(-1, 1), "position": position} | drawn

    def _picture(self, position: int) -> Tensor:
        """The picture at a position, or the next readable one of that epoch's order: uint8 3 x H x W."""
        n = len(self.source)
        order = epoch_order(self.seed, position // n, n)
        for offset in range(min(n, TRIED)):
            index = int(order[(position + offset) % n])
            try:
                return self.source.read(index)
            except PictureError as error:
                self.source.mark_unreadable(index)
                last = error
        raise ConfigError(f"{self.source.name}: {min(n, TRIED)} pictures in a row cannot be read, the last: {last}")

    def _random(self, picture: Tensor, random: np.random.Generator) -> Tensor:
        low, high = self.params.enlarge
        factor = low * (high / low) ** random.random()
        height, width = picture.shape[1:]
        factor = max(factor, self.size / min(height, width))
        enlarged = [max(self.size, round(side * factor)) for side in (height, width)] if factor > 1 else (height, width)
        top, left = (int(random.integers(0, side - self.size + 1)) for side in enlarged)
        if factor > 1:
            return enlarged_crop(picture, enlarged, top, left, self.size)
        return to_signed(picture[:, top : top + self.size, left : left + self.size])

    def _square(self, picture: Tensor, random: np.random.Generator) -> Tensor:
        side = min(picture.shape[1:])
        top, left = (int(random.integers(0, s - side + 1)) for s in picture.shape[1:])
        square = to_signed(picture[:, top : top + side, left : left + side])
        return F.interpolate(square[None], size=(self.size, self.size), mode="area")[0]


def positions(batch: int, rank: int, world: int, first: int) -> Iterator[list[int]]:
    """Batches of stream positions of one rank, without end: step s holds first + (s*B + i) * world + rank, i in 0..B-1."""
    for start in itertools.count(first + rank, batch * world):
        yield [start + i * world for i in range(batch)]


def enlarged_crop(picture: Tensor, enlarged: Sequence[int], top: int, left: int, size: int) -> Tensor:
    """A square of a picture as bicubic interpolation to `enlarged` (rows, columns) shows it; the rest is never computed.

    Args:
        picture: uint8 3 x H x W. top, left: of the square, in pixels of the enlarged picture; size: its side.
    Returns:
        float32 3 x size x size in about [-1, 1]: bicubic interpolation overshoots.
    """
    axes, shown = [], []
    for start, side, source in ((left, enlarged[1], picture.shape[2]), (top, enlarged[0], picture.shape[1])):
        centre = torch.arange(start, start + size, dtype=torch.float64) + 0.5
        axes.append((2 * centre / side - 1).float())  # -1 and 1 are the outer edges of the picture
        first, last = (int(centre[i] / side * source) for i in (0, -1))
        shown.append(slice(max(0, first - BICUBIC_MARGIN), last + BICUBIC_MARGIN + 1))
    grid = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1)[None]  # 1 size size (x, y)
    signed = torch.empty(picture.shape)[None]  # only what the square shows is ever read
    part = (..., shown[1], shown[0])
    signed[part] = to_signed(picture[part])
    return F.grid_sample(signed, grid, mode="bicubic", padding_mode="border", align_corners=False)[0]


def plain_crop(size: int, random: np.random.Generator) -> Tensor:
    """A square of one colour, or in half of the cases a slope between two: float32 3 x size x size in [-1, 1].

    Half of the colours are grey. Values are drawn from a range that is twice as wide and cut: half are 0 or 255, an eighth of the colours
    pure red, green, blue or between two of them, black or white.
    """
    ends = random.uniform(-2, 2, (2, 3)).clip(-1, 1)
    if random.random() < 0.5:
        ends[:] = ends[:, :1]
    if random.random() < 0.5:
        ends[1] = ends[0]
    angle = random.uniform(0, 2 * np.pi)
    along = np.linspace(-0.5, 0.5, size)
    place = 0.5 + (along[:, None] * np.sin(angle) + along * np.cos(angle)) / (abs(np.sin(angle)) + abs(np.cos(angle)))
    start, end = ends[:, :, None, None]  # 3 1 1
    return torch.from_numpy(start + (end - start) * place).float()


def framed(image: Tensor, random: np.random.Generator) -> Tensor:
    """A square, 3 x S x S in [-1, 1], that ends in lines of one grey, 1 to 4 pixels wide, on each side by a chance of a half.

    A third of the lines have an outermost pixel of black. Greys are uniform, a quarter of them black and a quarter white.
    """
    grey, image = random.uniform(-2, 2, 1).clip(-1, 1)[0], image.clone()
    for _ in range(4):
        if random.random() < 0.5:
            image[:, : random.integers(1, 5)] = grey
            if random.random() < 1 / 3:
                image[:, 0] = -1
        image = image.rot90(1, (1, 2))
    return image


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n pictures in an epoch: a permutation, int64 (n,)."""
    return generator(seed, EPOCH, epoch).permutation(n)


def stream(pictures: Pictures, batch: int, rank: int, world: int, first: int, pinned: bool = False) -> Iterator[Batch]:
    """Batches from position `first` of the stream on, without end. Closing the generator ends its workers.

    Args:
        batch: crops of one rank in each. rank, world: which of how many takes them.
        pinned: in memory that CUDA copies from while it computes.
    Raises:
        ConfigError: too many pictures in a row are unreadable.
        RuntimeError: PyTorch's, for a worker that the system has killed.
    """
    workers = pictures.params.workers
    if workers:
        # Each would make a folder of its own there for its pictures' socket, and leave it behind.
        multiprocessing.util.get_temp_dir()
    order = positions(batch, rank, world, first)
    batches = iter(
        DataLoader(pictures, batch_sampler=order, num_workers=workers, pin_memory=pinned, worker_init_fn=start_worker)
    )
    try:
        for item in batches:
            yield Batch(item.pop("image"), item.pop("position"), item)
    except ConfigError as error:
        # From a worker it comes as the worker's whole traceback, of which the last line is "class: message".
        message = str(error) if workers == 0 else str(error).rstrip().rpartition("\n")[2].partition(": ")[2]
        raise ConfigError(message) from None
    finally:
        if workers:
            batches._shutdown_workers()  # now: an error's traceback would keep the iterator, and with it the workers


def start_worker(_: int) -> None:
    """For a worker: signals to the group, such as Ctrl-C, reach the training process alone, which ends its workers."""
    if hasattr(os, "setsid"):
        os.setsid()
    # Freed at once, untouched: from then on glibc keeps blocks of this size for the next picture, 16 -> 9 ms a crop.
    torch.empty(30 << 20, dtype=torch.uint8)
