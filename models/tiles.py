"""Pictures of any size: above one, E and D run in tiles, and attention looks at a sample of all positions.

The networks at latent resolution see one position per 16x16 pixels and always run whole. E and D see all pixels. In a
picture of more than 1.5 side^2 pixels they run on tiles: squares of `side` pixels from the top left corner, each with
a margin of MARGIN latent positions, of which only the square is kept. What E or D takes from the whole (`sharing`) comes
from one pass over up to 9 crops of CROP x CROP latent positions of their own input, spread evenly from corner to corner.
A picture's size alone decides all of this; indices, symbols and noise are those of one grid.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from models.bitstream import CELL
from models.sharing import sharing

SIDE = 1024  # of a tile, in pixels
MARGIN = 8  # latent positions
CROP, CROPS = 24, 9

Rectangle = tuple[slice, slice]  # rows and columns


@dataclass(frozen=True)
class Tiles:
    """How a picture is worked on.

    Attributes:
        height, width: in pixels. side: of a tile without its margin, in pixels, a multiple of 16.
    """

    height: int
    width: int
    side: int = SIDE

    @property
    def whole(self) -> bool:
        """Whether the picture is one tile, of which nothing is sampled: up to 1536x1024 pixels with the usual side."""
        return 2 * self.height * self.width <= 3 * self.side**2

    @property
    def pixels(self) -> int:
        """The most that E or D works on at once."""
        if self.whole:
            return self.height * self.width
        tile = [min(size, self.side + 2 * MARGIN * CELL) for size in (self.height, self.width)]
        return max(tile[0] * tile[1], CELL**2 * sum(_area(crop) for crop in self.crops()))

    def sampled(self) -> AbstractContextManager:
        """Inside it, a network that runs on the whole latent looks at a sample of it where the picture is large."""
        return nullcontext() if self.whole else sharing()

    def run(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """E or D of a picture, in tiles if it is large.

        Args:
            network: of 1 x 3 x H x W gives 1 x d x h x w (E), or of 1 x d x h x w gives 1 x 3 x 16h x 16w (D).
            x: one picture's input of any type, whole.
        Returns:
            its output, whole, as the network gives it; pixels cropped to the picture's.
        """
        if self.whole:
            return network(x)[..., : self.height, : self.width]
        encodes = x.shape[-2:] == (self.height, self.width)
        unit, result = (CELL, 1) if encodes else (1, CELL)
        with sharing():
            network(torch.cat([_cut(x, crop, unit) for crop in self.crops()]))
            out = None
            for seen, kept in self.tiles():
                part = network(_cut(x, seen, unit))
                if out is None:
                    out = part.new_empty(*part.shape[:2], *(self.latent if encodes else (self.height, self.width)))
                place = _cut(out, kept, result)
                top, left = (result * (k.start - s.start) for s, k in zip(seen, kept, strict=True))
                place.copy_(part[..., top : top + place.shape[-2], left : left + place.shape[-1]])
        return out

    @property
    def latent(self) -> tuple[int, int]:
        """Rows and columns of latent positions."""
        return -(-self.height // CELL), -(-self.width // CELL)

    def tiles(self) -> Iterator[tuple[Rectangle, Rectangle]]:
        """What a tile sees and what is kept of it, in latent positions; row by row."""
        step = self.side // CELL
        for top in range(0, self.latent[0], step):
            for left in range(0, self.latent[1], step):
                ends = min(top + step, self.latent[0]), min(left + step, self.latent[1])
                kept = slice(top, ends[0]), slice(left, ends[1])
                yield tuple(slice(max(0, k.start - MARGIN), k.stop + MARGIN) for k in kept), kept

    def crops(self) -> list[Rectangle]:
        """The crops that speak for the whole, in latent positions: 3 x 3, or fewer one way and more the other."""
        sizes = self.height // CELL, self.width // CELL  # only whole cells
        most = [-(-size // CROP) for size in sizes]
        rows = min(3, most[0])
        columns = min(CROPS // rows, most[1])
        rows = min(CROPS // columns, most[0])
        return [(r, c) for r in _spread(sizes[0], rows) for c in _spread(sizes[1], columns)]


def _spread(size: int, count: int) -> list[slice]:
    length = min(CROP, size)
    starts = (i * (size - length) // max(1, count - 1) for i in range(count))
    return [slice(start, start + length) for start in starts]


def _cut(x: Tensor, at: Rectangle, unit: int) -> Tensor:
    rows, columns = (slice(unit * side.start, unit * side.stop) for side in at)
    return x[..., rows, columns]


def _area(at: Rectangle) -> int:
    return (at[0].stop - at[0].start) * (at[1].stop - at[1].start)
