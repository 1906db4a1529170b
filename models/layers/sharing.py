"""What a network takes from a whole map at once, and passes over parts of it share: of tiles, above all (tiles.py).

Two kinds of layers look at all positions: GroupNorm, for its means and variances, and attention, for its keys and values.
Either one pass finds them, for the passes that follow, or the means and variances are found layer by layer, which is exact:
every pass over the parts ends at the first layer whose own are not known, and they are those of all parts together.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

KEYS = 4096  # positions that attention looks at, at most

Moments = tuple[Tensor, Tensor]  # mean and variance of every channel, (C,) each
Inner = Callable[[Tensor], Tensor]  # N C H W -> the part of a map that counts


class Met(Exception):
    """A pass over a part met a layer whose moments are not known."""

    def __init__(self, layer: nn.Module, count: int, moments: Moments):
        super().__init__()
        self.layer, self.count, self.moments = layer, count, moments


class Sharing:
    """What passes share.

    Attributes:
        kept: by layer. keys: positions that attention looks at, at most. inner: during a pass over a part, what of its
            maps counts, and the pass ends where something is lacking; None lets it find all that is.
    """

    def __init__(self, keys: int):
        self.kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.keys = keys
        self.inner: Inner | None = None

    def learn(self, met: list[Met]) -> None:
        """Keep the moments of the layer that all parts met: m = sum n_i m_i / n, v = sum n_i (v_i + m_i^2) / n - m^2."""
        share = torch.tensor([each.count for each in met], dtype=torch.float64)
        share = (share / share.sum())[:, None]
        means, variances = (torch.stack(each).cpu().double() for each in zip(*(m.moments for m in met), strict=True))
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        self.kept[met[0].layer] = tuple(m.to(met[0].moments[0]) for m in (mean, variance))


_sharing: ContextVar[Sharing | None] = ContextVar("sharing", default=None)


@contextmanager
def sharing(keys: int = KEYS) -> Iterator[Sharing]:
    """Inside it, the first pass of a network finds what its later ones take; of one picture, which a batch is parts of."""
    token = _sharing.set(Sharing(keys))
    try:
        yield _sharing.get()
    finally:
        _sharing.reset(token)


def is_sharing() -> bool:
    """Whether networks take what another pass found."""
    return _sharing.get() is not None


def shared(layer: nn.Module, find: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """What `find` gave in the layer's first pass inside `sharing`; None outside it."""
    now = _sharing.get()
    if now is None:
        return None
    if layer not in now.kept:
        now.kept[layer] = find()
    return now.kept[layer]


def shared_moments(layer: nn.Module, moments: Callable[[Tensor], Moments], x: Tensor) -> Moments | None:
    """`shared` of a map's moments. Raises Met with those of a part."""
    now = _sharing.get()
    if now and now.inner and layer not in now.kept:
        x = now.inner(x)
        raise Met(layer, x[:, 0].numel(), moments(x))
    return shared(layer, lambda: moments(x))


def spread(x: Tensor) -> Tensor:
    """Positions of a batch of maps, every n-th row and every m-th column of each: N C H W -> 1 C 1 M, M at most `keys`."""
    keys = _sharing.get().keys if is_sharing() else KEYS
    positions = x.numel() / x.shape[1]
    x = x[:, :, :: math.ceil(math.sqrt(positions / keys))]
    x = x[..., :: math.ceil(x.numel() / x.shape[1] / keys)]
    return x.transpose(0, 1).flatten(1)[None, :, None]
