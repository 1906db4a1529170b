"""The largest file that is not over a budget: the code is searched, the image encoder runs once."""

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from models.codec import Codec
from models.records import Analysed
from models.residual_hyperprior import LEVEL_CODES
from utils.errors import BudgetError

NEIGHBOURS = 3  # codes tried on both sides of the one that bisection finds: sizes need not rise at every step
ENOUGH = 0.97  # share of a budget from which the search ends; below it, every code is written


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
    """Whole bytes that `target_bpp` bits per pixel of the source picture allow."""
    return int(target_bpp * height * width / 8)


def fit(codec: Codec, picture: Analysed, max_bytes: int, at_most: bool = True) -> Fitted:
    """The largest file of at most `max_bytes`; one with a residual that takes ENOUGH of them ends the search.

    Args:
        at_most: False refuses a budget above the picture's largest file, too (a target rate that cannot be met).
    Raises:
        BudgetError: the range of the picture's files does not hold the budget; says the range.
    """
    write = cache(lambda code: codec.write(picture, code))

    def size(code: int) -> int:
        return len(write(code))

    def best(codes: Iterable[int]) -> int:
        return max((code for code in codes if size(code) <= max_bytes), key=size)

    highest = LEVEL_CODES if codec.has_levels else 0
    if max_bytes < size(0) or (max_bytes > size(highest) and not at_most):
        raise BudgetError(_outside(max_bytes, size(0), size(highest), picture))
    if max_bytes >= size(highest):
        note = "the largest file of this picture" if codec.has_levels else "base alone, all that these weights have"
        return Fitted(write(highest), highest, note if max_bytes > size(highest) else None)
    found = bisect_right(range(1, highest), max_bytes, key=size)  # the code, if sizes rise with it; 0 fits always
    code = best(range(max(0, found - NEIGHBOURS), min(highest, found + NEIGHBOURS) + 1))
    if code == 0 or size(code) < ENOUGH * max_bytes:
        code = best(range(highest + 1))
    used = size(code)
    if used == max_bytes or (code and used >= ENOUGH * max_bytes):
        return Fitted(write(code), code)
    above = min(other for other in map(size, range(highest + 1)) if other > max_bytes)
    if code == 0:
        return Fitted(write(0), 0, f"base alone; the smallest file with a residual has {above:,} bytes")
    note = f"{used / max_bytes:.0%} of the budget; the next larger file has {above:,} bytes"
    return Fitted(write(code), code, note)


def _outside(max_bytes: int, smallest: int, largest: int, picture: Analysed) -> str:
    # Rounded inwards, so that the rates that are told can be asked for.
    per_byte = 8e4 / (picture.file.height * picture.file.width)
    low, high = math.ceil(smallest * per_byte) / 1e4, math.floor(largest * per_byte) / 1e4
    return (
        f"{max_bytes:,} bytes ({max_bytes * per_byte / 1e4:.4f} bpp) are outside what these weights can do for this "
        f"picture: {smallest:,} to {largest:,} bytes ({low:.4f} to {high:.4f} bpp)"
    )
