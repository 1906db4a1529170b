"""Maps beside mirror images of themselves: larger ones of the same content."""

import torch
from torch import Tensor

from models.sizes.tiles import Network


def mirrored(x: Tensor, rows: int, columns: int) -> Tensor:
    """N C h w, with at least so many rows and columns: the map, then its mirror image with the edge repeated, and so on."""
    for dim, least in ((2, rows), (3, columns)):
        side = x.shape[dim]
        if side < least:
            place = torch.arange(least, device=x.device) % (2 * side)
            x = x.index_select(dim, torch.minimum(place, 2 * side - 1 - place))
    return x


def among_images(copies: tuple[int, int], network: Network, *maps: Tensor) -> Tensor:
    """What a network makes of maps among so many rows and columns of mirror images of themselves, in the place of the maps.

    Its results have the size of the first of them. (1, 1): the network on the maps alone.
    """
    rows, columns = copies
    wide = (mirrored(m, rows * m.shape[2], columns * m.shape[3]) for m in maps)
    return network(*wide)[..., : maps[0].shape[2], : maps[0].shape[3]]
