"""The largest file that is not over a budget: the level is searched, the image encoder runs once."""

import math
from dataclasses import dataclass

from models.codec import Codec
from models.records import Analysed
from models.residual_hyperprior import LEVEL_CODES
from utils.errors import BudgetError

NEIGHBOURS = 3  # levels tried on both sides of the one that bisection finds: sizes need not rise at every step
ENOUGH = 0.97  # share of a budget from which the search ends; below it, every level is written


@dataclass(frozen=True)
class Fitted:
    """The file of a budget.

    Attributes:
        data: the file. level: 0 for the base alone, else 1 to 255.
        note: what the user should know about it, or None.
    """

    data: bytes
    level: int
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
    files = _Files(codec, picture)
    highest = LEVEL_CODES if codec.has_levels else 0
    if max_bytes < len(files[0]) or (max_bytes > len(files[highest]) and not at_most):
        raise BudgetError(_outside(max_bytes, len(files[0]), len(files[highest]), picture))
    if max_bytes >= len(files[highest]):
        note = "the largest file of this picture" if codec.has_levels else "base alone, all that these weights have"
        return Fitted(files[highest], highest, note if max_bytes > len(files[highest]) else None)
    level = _by_bisection(files, max_bytes)
    if level == 0 or len(files[level]) < ENOUGH * max_bytes:
        level = files.largest(range(LEVEL_CODES + 1), max_bytes)
    return Fitted(files[level], level, _shortfall(files, level, max_bytes))


def _by_bisection(files: "_Files", max_bytes: int) -> int:
    """Level of a file within the budget, the largest if sizes rise with the level; 0, the base alone, always fits."""
    low, high = 0, LEVEL_CODES  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(files[middle]) <= max_bytes else (low, middle)
    return files.largest(range(max(0, low - NEIGHBOURS), min(LEVEL_CODES, low + NEIGHBOURS) + 1), max_bytes)


def _shortfall(files: "_Files", level: int, max_bytes: int) -> str | None:
    """A note on the base alone, or on a file that leaves much of its budget; every level was written then."""
    used = len(files[level])
    if used == max_bytes or (level and used >= ENOUGH * max_bytes):
        return None
    above = min(len(data) for data in files.values() if len(data) > max_bytes)
    if level == 0:
        return f"base alone; the smallest file with a residual has {above:,} bytes"
    return f"{used / max_bytes:.0%} of the budget; the next larger file has {above:,} bytes"


def _outside(max_bytes: int, smallest: int, largest: int, picture: Analysed) -> str:
    # Rounded inwards, so that the rates that are told can be asked for.
    per_byte = 8e4 / (picture.file.height * picture.file.width)
    low, high = math.ceil(smallest * per_byte) / 1e4, math.floor(largest * per_byte) / 1e4
    return (
        f"{max_bytes:,} bytes ({max_bytes * per_byte / 1e4:.4f} bpp) are outside what these weights can do for this "
        f"picture: {smallest:,} to {largest:,} bytes ({low:.4f} to {high:.4f} bpp)"
    )


class _Files(dict):
    """Files of a picture by level, written when first asked for."""

    def __init__(self, codec: Codec, picture: Analysed):
        super().__init__()
        self.codec, self.picture = codec, picture

    def __missing__(self, level: int) -> bytes:
        self[level] = self.codec.write(self.picture, level)
        return self[level]

    def largest(self, levels: range, max_bytes: int) -> int:
        """The level of the largest file within the budget, among levels of which at least one fits."""
        return max((g for g in levels if len(self[g]) <= max_bytes), key=lambda g: len(self[g]))
