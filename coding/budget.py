"""The largest file that is not over a budget: the code is searched, the image encoder runs once."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

from measuring.metrics import bpp
from models.bitstream import LEAST_RESIDUAL
from models.codec import Codec
from models.records import Analysed
from models.residual_hyperprior import LEVEL_CODES
from utils.errors import BudgetError

WEIGHTS = [2 ** (step / 8 - 6) for step in range(49)]  # of the bits of a base that is not to have the usual size
NEIGHBOURS = 3  # codes written on both sides of the one that is found: sizes need not rise at every step
ENOUGH = 0.97  # share of a budget below which the table says what a larger file would take

Size = Callable[[int], int]  # bytes of the file of a code


@dataclass(frozen=True)
class Fitted:
    """The file of a budget.

    Attributes:
        data: the file. code: 0 for the base alone, else 1 to 255.
        note: what the user should know about it, or None.
    """

    data: bytes
    code: int
    note: str | None = None


def bytes_of_bpp(target_bpp: float, height: int, width: int) -> int:
    """The most bytes whose rate, as `measuring.metrics.bpp` reports it, is at most `target_bpp` bits per pixel."""
    exact = math.floor(Fraction(target_bpp) * height * width / 8)
    return exact + (bpp(exact + 1, height, width) <= target_bpp)  # the reported rate may be rounded down to the target


def fit(codec: Codec, picture: Analysed, max_bytes: int) -> Fitted:
    """The largest file of at most `max_bytes`: of the highest level below the budget, or one near it.

    Sizes rise with the level but for a few bytes, and where few symbols are coded may fall before they rise. Some
    twenty files are written, and one where no residual can fit. There, weights with an index model give a base with less weight
    on its bits, and below the base one with more.

    Raises:
        BudgetError: the smallest file has more bytes.
    """
    write = cache(lambda code: codec.write(picture, code))

    def size(code: int) -> int:
        return len(write(code))

    base = size(0)
    if max_bytes < base:
        return _below_base(codec, picture, max_bytes, base)
    if not codec.has_levels or max_bytes < base + LEAST_RESIDUAL:
        why = f"a residual takes {LEAST_RESIDUAL} bytes or more" if codec.has_levels else "all that these weights have"
        return _nearer_base(codec, picture, max_bytes, Fitted(write(0), 0, f"base alone; {why}"))
    if max_bytes >= size(LEVEL_CODES):
        note = "the highest level: more bytes would not serve" if max_bytes > size(LEVEL_CODES) else None
        return Fitted(write(LEVEL_CODES), LEVEL_CODES, note)
    found = _edge(size, max_bytes, 0, LEVEL_CODES) or _beyond_valley(size, max_bytes)
    near = range(max(1, found - NEIGHBOURS), min(LEVEL_CODES, found + NEIGHBOURS) + 1)
    code = max((code for code in (0, *near) if size(code) <= max_bytes), key=lambda code: (size(code), code))
    fitted = Fitted(write(code), code, _note(size(code), max_bytes, code, map(size, near)))
    return fitted if code else _nearer_base(codec, picture, max_bytes, fitted)


def _below_base(codec: Codec, picture: Analysed, max_bytes: int, base: int) -> Fitted:
    """The base alone, of the least weight on its bits that fits. Errors as `fit`."""
    if not codec.index_model:
        raise BudgetError(_too_small(max_bytes, base, picture))
    weights = [weight for weight in WEIGHTS if weight > codec.rdo]
    found = _least_weight(codec, picture, max_bytes, weights)
    if found is None:
        smallest = len(codec.base_file(picture, weights[-1])) if weights else base
        raise BudgetError(_too_small(max_bytes, min(base, smallest), picture))
    weight, data = found
    return Fitted(data, 0, f"base alone, with more weight on its bits: --rdo {weight:.6g}")


def _nearer_base(codec: Codec, picture: Analysed, max_bytes: int, usual: Fitted) -> Fitted:
    """The base alone, with less weight on its bits than usual if that fits: nearer to the picture."""
    if len(usual.data) == max_bytes:
        return replace(usual, note=None)
    weights = [0.0, *(weight for weight in WEIGHTS if weight < codec.rdo)]
    found = _least_weight(codec, picture, max_bytes, weights) if codec.rdo else None
    if found is None or len(found[1]) <= len(usual.data):
        return usual
    weight, data = found
    return Fitted(data, 0, f"{usual.note}; less weight on its bits: --rdo {weight:.6g}")


def _least_weight(
    codec: Codec, picture: Analysed, max_bytes: int, weights: Sequence[float]
) -> tuple[float, bytes] | None:
    """The first of rising weights whose base fits, and its file; None where none does."""
    write = cache(lambda weight: codec.base_file(picture, weight))
    found = bisect_left(weights, True, key=lambda weight: len(write(weight)) <= max_bytes)
    return None if found == len(weights) else (weights[found], write(weights[found]))


def _edge(size: Size, max_bytes: int, fits: int, exceeds: int) -> int:
    """A code that is not over the budget while the next one is, between one of either kind."""
    return bisect_right(range(fits + 1, exceeds), max_bytes, key=size) + fits


def _beyond_valley(size: Size, max_bytes: int) -> int:
    """The edge above the smallest of the files with a residual; 0 where that is over the budget."""
    tried = [2**power for power in range(8)] + [LEVEL_CODES]  # all are too large: those that bisection down to 0 met
    while size(lowest := min(tried, key=size)) > max_bytes:
        at = tried.index(lowest)
        middles = {(lowest + other) // 2 for other in tried[max(0, at - 1) : at + 2]} - {*tried}
        if not middles:
            return 0
        tried = sorted({*tried, *middles})
    return _edge(size, max_bytes, lowest, next(code for code in tried if code > lowest and size(code) > max_bytes))


def _note(used: int, max_bytes: int, code: int, near: Iterable[int]) -> str | None:
    """What there is to say of a file that leaves much of its budget."""
    if used == max_bytes or (code and used >= ENOUGH * max_bytes):
        return None
    above = min(size for size in near if size > max_bytes)
    if code == 0:
        return f"base alone; with a residual from {above:,} bytes"
    return f"{used / max_bytes:.0%} of the budget; the next larger file has {above:,} bytes"


def _too_small(max_bytes: int, smallest: int, picture: Analysed) -> str:
    height, width = picture.file.height, picture.file.width
    rate = -(-80_000 * smallest // (height * width)) / 1e4  # rounded up, so that it can be asked for
    return (
        f"{max_bytes:,} bytes ({bpp(max_bytes, height, width):.4f} bpp) are too few for this picture: "
        f"its smallest file has {smallest:,} bytes ({rate:.4f} bpp)"
    )
