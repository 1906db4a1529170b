"""Pictures of any size: above one, networks run in tiles, and what they take from the whole is the same for all tiles.

A picture of at most 1.5 side^2 pixels is coded whole. In a larger one E and D run on tiles: squares of `side` pixels from
the top left corner, each seen with a margin of MARGIN latent positions, which is not kept. What D takes from the whole
(`sharing`) comes from one pass over up to 9 crops of CROP x CROP latent positions of its own input, spread evenly from
corner to corner. E's part above the latent's resolution takes exact means and variances, found layer by layer, if they are
of few layers (EXACT), else those of crops, too. The rest of E, D's part at the latent's resolution, VQ-E, VQ-D and U see one position where it and D see 256 pixels:
their tiles, margins, crops and the size up to which they run whole are COARSE times as large along each side. Convolutions
alone (the residual codec) always run whole. A picture's size alone decides all of this; indices, symbols and noise are those
of one grid.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.bitstream import CELL
from models.layers.sharing import KEYS, Inner, Met, Sharing, sharing

SIDE = 1024  # of a tile, in pixels
MARGIN, CROP, WINDOW = 8, 24, 16  # latent positions; WINDOW: that the denoiser's windows span, of all resolutions
CROPS = 9
COARSE = 4
EXACT = 4  # layers whose moments are found layer by layer: as many passes, each up to its layer
ENCODER_KEYS = 16384  # of E's attention, on which rates depend

Network = Callable[..., Tensor]
Rectangle = tuple[slice, slice]  # rows and columns


def direct(network: Network, *maps: Tensor) -> Tensor:
    """The network on whole maps: what `Tiles.run` does with a small picture."""
    return network(*maps)


@dataclass(frozen=True)
class Tiles:
    """How a picture is worked on by E and D, and by `latent` for the networks of the latent.

    Attributes:
        height, width: in pixels. side: of a tile without its margin, in pixels, a multiple of 64. scale: 1 or COARSE.
        margin: that a tile sees around itself, in latent positions, times `scale`.
    """

    height: int
    width: int
    side: int = SIDE
    scale: int = 1
    margin: int = MARGIN

    @property
    def latent(self) -> "Tiles":
        """The tiles of E's last resolution, VQ-E, VQ-D and U."""
        return replace(self, scale=COARSE)

    @property
    def small(self) -> bool:
        """Whether the picture is coded whole, and nothing is sampled: up to 1536x1024 pixels with the usual side."""
        return 2 * self.height * self.width <= 3 * self.side**2

    @property
    def whole(self) -> bool:
        """Whether these networks run on the whole picture."""
        return 2 * self.height * self.width <= 3 * (self.scale * self.side) ** 2

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of latent positions."""
        return -(-self.height // CELL), -(-self.width // CELL)

    @property
    def most(self) -> int:
        """Latent positions that these networks work on at once."""
        if self.whole:
            return math.prod(self.size)
        tile = (min(size, self.scale * (self.side // CELL + 2 * self.margin)) for size in self.size)
        return max(math.prod(tile), sum(_positions(crop) for crop in self.crops()))

    def run(self, network: Network, *maps: Tensor, exact: bool = False, keys: int = KEYS) -> Tensor:
        """A network on one picture, in tiles if it is large.

        Args:
            network: of 1 x 3 x H x W or latent maps, to 1 x 3 x 16h x 16w or, with `latent` or of pixels, to a latent map.
            maps: its inputs, whole.
            exact: find means and variances layer by layer; for a network without attention. keys: for one with it.
        Returns:
            its output, whole; pixels cropped to the picture's.
        """
        if self.small:
            return network(*maps)[..., : self.height, : self.width]
        with sharing(keys) as found:
            return network(*maps) if self.whole else self._run(network, maps, found, exact)

    def _run(self, network: Network, maps: tuple[Tensor, ...], found: Sharing, exact: bool) -> Tensor:
        encodes = maps[0].shape[-2:] == (self.height, self.width)
        unit = CELL if encodes else 1  # values of a map per latent position, along a side
        result = 1 if encodes or self.scale > 1 else CELL
        size = self.size if result == 1 else (self.height, self.width)
        if not exact:
            network(*(torch.cat([_cut(m, crop, unit) for crop in self.crops()]) for m in maps))
        out, met = None, [None]
        while met:  # once, or once more than there are layers to find
            met = []
            for seen, kept in self.tiles():
                found.inner = self._inner(seen, kept) if exact else None
                try:
                    part = network(*(_cut(m, seen, unit) for m in maps))
                except Met as lacking:
                    met.append(lacking.with_traceback(None))  # whose frames keep the tile's maps
                    continue
                out = part.new_empty(*part.shape[:-2], *size) if out is None else out
                place = _cut(out, kept, result)
                top, left = (result * (k.start - s.start) for s, k in zip(seen, kept, strict=True))
                place.copy_(part[..., top : top + place.shape[-2], left : left + place.shape[-1]])
            if met:
                found.learn(met)
        return out

    def _inner(self, seen: Rectangle, kept: Rectangle) -> Inner:
        """Cuts maps of what a tile sees, of any resolution above the latent's, to what is kept of it."""

        def inner(x: Tensor) -> Tensor:
            unit = x.shape[-2] // (min(seen[0].stop, self.size[0]) - seen[0].start)
            inside = tuple(slice(k.start - s.start, k.stop - s.start) for s, k in zip(seen, kept, strict=True))
            return _cut(x, inside, unit)

        return inner

    def tiles(self) -> Iterator[tuple[Rectangle, Rectangle]]:
        """What a tile sees and what is kept of it, in latent positions; row by row."""
        step = self.scale * self.side // CELL
        for top in range(0, self.size[0], step):
            for left in range(0, self.size[1], step):
                kept = slice(top, min(top + step, self.size[0])), slice(left, min(left + step, self.size[1]))
                yield tuple(self._seen(k, size) for k, size in zip(kept, self.size, strict=True)), kept

    def _seen(self, kept: slice, size: int) -> slice:
        """A margin on both sides; at the picture's ends more on the inner one, so that tiles are all of one shape.

        Memory that one tile frees then fits the next. Tiles of the latent start where windows of the denoiser do.
        """
        length, unit = self.scale * (self.side // CELL + 2 * self.margin), WINDOW if self.scale > 1 else 1
        start = max(0, min(kept.start - self.scale * self.margin, size - length)) // unit * unit
        return slice(start, max(start + length, min(size, kept.stop + self.scale * self.margin)))

    def crops(self) -> list[Rectangle]:
        """The crops that speak for the whole, in latent positions: 3 x 3, or fewer one way and more the other."""
        sizes = self.height // CELL, self.width // CELL  # without cells that are partly outside
        most = [-(-size // (self.scale * CROP)) for size in sizes]
        rows = min(3, most[0])
        columns = min(CROPS // rows, most[1])
        rows = min(CROPS // columns, most[0])
        return [(r, c) for r in self._spread(sizes[0], rows) for c in self._spread(sizes[1], columns)]

    def _spread(self, size: int, count: int) -> list[slice]:
        length = min(self.scale * CROP, size)
        starts = (i * (size - length) // max(1, count - 1) for i in range(count))
        return [slice(start, start + length) for start in starts]


def _cut(x: Tensor, at: Rectangle, unit: int) -> Tensor:
    rows, columns = (slice(unit * side.start, unit * side.stop) for side in at)
    return x[..., rows, columns]


def _positions(at: Rectangle) -> int:
    return math.prod(side.stop - side.start for side in at)
