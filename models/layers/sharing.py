"""What a network takes from a whole map at once, found in one pass and kept for others: of tiles, above all (tiles.py).

Two kinds of layers look at all positions: GroupNorm, for its means and variances, and attention, for its keys and values.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

KEYS = 4096  # positions that attention looks at, at most
_kept: ContextVar[dict[nn.Module, tuple[Tensor, Tensor]] | None] = ContextVar("kept", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Inside it, the first pass of a network finds what its later ones take; of one picture, which a batch is parts of."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def is_sharing() -> bool:
    """Whether networks take what another pass found."""
    return _kept.get() is not None


def shared(layer: nn.Module, find: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """What `find` gave in the layer's first pass inside `sharing`; None outside it."""
    kept = _kept.get()
    if kept is None:
        return None
    if layer not in kept:
        kept[layer] = find()
    return kept[layer]


def spread(x: Tensor) -> Tensor:
    """At most KEYS positions of a batch of maps, every n-th row and every m-th column of each: N C H W -> 1 C 1 M."""
    positions = x.numel() / x.shape[1]
    x = x[:, :, :: math.ceil(math.sqrt(positions / KEYS))]
    x = x[..., :: math.ceil(x.numel() / x.shape[1] / KEYS)]
    return x.transpose(0, 1).flatten(1)[None, :, None]
