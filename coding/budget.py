"""The largest file that is not over a budget: the level is searched at one scale, and the scale follows from the budget."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

from measuring.metrics import bpp
from models.bitstream import LEAST_RESIDUAL, LEAST_SCALE, WHOLE, CodedPicture
from models.codec import Codec
from models.records import Analysed
from models.residual_hyperprior import LEVEL_CODES
from utils.errors import BudgetError

BASE_SHARE = 0.5  # of a budget that goes into the base, about: a picture that needs more is coded at a smaller size
FURTHER = 2  # scales below the first that are tried for a residual
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


def fit_scaled(codec: Codec, max_bytes: int, analyse: Callable[[int], Analysed]) -> Fitted:
    """`fit` at the scale that suits: the largest at which the base takes about BASE_SHARE of the budget.

    Below twice the base, bits serve better as residual of a smaller picture (docs/ablations.md). Where no residual
    fits, as of pictures of a few hundred pixels, the base alone is sent, of the whole picture if that fits; so it is with
    weights that have no residual, at about the largest scale that fits.

    Args:
        analyse: the picture at a scale, as `Codec.analyse`; the whole one is asked for first, and few others.
    Raises:
        BudgetError: the smallest file has more bytes.
    """
    whole = analyse(WHOLE)
    base = codec.write(whole, 0)
    spare = Fitted(base, 0, "base alone") if len(base) <= max_bytes else None
    first = _first_scale(whole.file, max_bytes, BASE_SHARE if codec.has_levels else 1.0)
    for scale in range(first, LEAST_SCALE - 1, -1):
        analysed = whole if scale == WHOLE else analyse(scale)
        try:
            fitted = fit(codec, analysed, max_bytes)
        except BudgetError:
            continue
        if fitted.code or not codec.has_levels:
            return fitted
        spare = spare or fitted
        if scale <= first - FURTHER:
            break
    if spare is None:
        raise BudgetError(_too_small(max_bytes, min(len(base), len(codec.write(analysed, 0))), analysed))
    return spare


def _first_scale(whole: CodedPicture, max_bytes: int, share: float) -> int:
    """The largest scale whose share of the whole picture's indices makes its base `share` of the budget, or less."""
    beside = whole.header_bytes + whole.check_bytes
    cells = {scale: math.prod(replace(whole, scale=scale).latent_size) for scale in range(LEAST_SCALE, WHOLE + 1)}
    allowed = share * (max_bytes - beside) / len(whole.base) * cells[WHOLE]
    return max((scale for scale in cells if cells[scale] <= allowed), default=LEAST_SCALE)


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
    found = _edge(size, max_bytes, 0, LEVEL_CODES) or _beyond_valley(size, max_bytes)
    if found == LEVEL_CODES - 1 and size(LEVEL_CODES) <= max_bytes:
        note = "the highest level: more bytes would not serve" if max_bytes > size(LEVEL_CODES) else None
        return Fitted(write(LEVEL_CODES), LEVEL_CODES, note)
    near = range(max(1, found - NEIGHBOURS), min(LEVEL_CODES, found + NEIGHBOURS) + 1)
    code = max((code for code in (0, *near) if size(code) <= max_bytes), key=lambda code: (size(code), code))
    return Fitted(write(code), code, _note(size(code), max_bytes, code, map(size, near)))


def _edge(size: Size, max_bytes: int, fits: int, exceeds: int) -> int:
    """A code that is not over the budget while the next one is, or the last before `exceeds`; `fits` is not over it."""
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
