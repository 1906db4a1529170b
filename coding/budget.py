"""The largest file that is not over a budget: the level is searched at one scale, and the scale follows from the budget."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from torch import Tensor

from measuring.metrics import bpp
from models.bitstream import LEAST_RESIDUAL, LEAST_SCALE, WHOLE
from models.codec import Codec
from models.records import Analysed
from models.residual_hyperprior import LEVEL_CODES
from utils.errors import BudgetError

BASE_SHARE = 0.45  # of a budget that goes into the base, at most: a picture that needs more is coded at a smaller size
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


def fit_scaled(codec: Codec, image: Tensor, max_bytes: int, whole: Analysed) -> Fitted:
    """`fit` at the scale that suits: the largest at which the base takes BASE_SHARE of the budget, or a little more.

    Below some 2.2 times the base, bits serve better as residual of a smaller picture (docs/results.md). Weights without a
    residual code the largest picture whose base fits.

    Args:
        image: uint8 (3, H, W). whole: it, analysed at its whole size.
    Raises:
        BudgetError: the smallest file has more bytes.
    """
    share = BASE_SHARE if codec.has_levels else 1.0
    found = math.isqrt(int(WHOLE**2 * share * max_bytes / len(codec.write(whole, 0))))
    for scale in range(max(LEAST_SCALE, min(found, WHOLE)), LEAST_SCALE - 1, -1):
        analysed = whole if scale == WHOLE else codec.analyse(image, scale)
        try:
            fitted = fit(codec, analysed, max_bytes)
        except BudgetError:
            if scale == LEAST_SCALE:
                raise
        else:
            if fitted.code or not codec.has_levels or scale == LEAST_SCALE:
                return fitted


def fit(codec: Codec, picture: Analysed, max_bytes: int) -> Fitted:
    """The largest file of at most `max_bytes` at one scale: of the highest level below the budget, or one near it.

    Sizes rise with the level but for a few bytes, and where few symbols are coded may fall before they rise. Some
    twenty files are written, and one where no residual can fit.

    Raises:
        BudgetError: the smallest file has more bytes.
    """
    write = cache(lambda code: codec.write(picture, code))

    def size(code: int) -> int:
        return len(write(code))

    base = size(0)
    if max_bytes < base:
        raise BudgetError(_too_small(max_bytes, base, picture))
    if not codec.has_levels or max_bytes < base + LEAST_RESIDUAL:
        why = f"a residual takes {LEAST_RESIDUAL} bytes or more" if codec.has_levels else "all that these weights have"
        return Fitted(write(0), 0, None if max_bytes == base else f"base alone; {why}")
    if max_bytes >= size(LEVEL_CODES):
        note = "the highest level: more bytes would not serve" if max_bytes > size(LEVEL_CODES) else None
        return Fitted(write(LEVEL_CODES), LEVEL_CODES, note)
    found = _edge(size, max_bytes, 0, LEVEL_CODES) or _beyond_valley(size, max_bytes)
    near = range(max(1, found - NEIGHBOURS), min(LEVEL_CODES, found + NEIGHBOURS) + 1)
    code = max((code for code in (0, *near) if size(code) <= max_bytes), key=lambda code: (size(code), code))
    return Fitted(write(code), code, _note(size(code), max_bytes, code, map(size, near)))


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
    height, width, scale = picture.file.height, picture.file.width, picture.file.scale
    rate = -(-80_000 * smallest // (height * width)) / 1e4  # rounded up, so that it can be asked for
    smaller = "" if scale == LEAST_SCALE else f" at scale {scale / WHOLE:g}, and smaller ones below"
    return (
        f"{max_bytes:,} bytes ({bpp(max_bytes, height, width):.4f} bpp) are too few for this picture: "
        f"its smallest file has {smallest:,} bytes ({rate:.4f} bpp){smaller}"
    )
