"""The largest file that is not over a budget: the level is searched, the image encoder runs once."""

from dataclasses import dataclass

from models.codec import Codec
from models.records import Analysed
from models.residual_hyperprior import LEVEL_CODES
from utils.errors import BudgetError

NEIGHBOURS = 3  # levels tried beyond the one that bisection finds: sizes need not rise at every step


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
    """The largest file of at most `max_bytes`.

    Args:
        at_most: False refuses a budget above the picture's largest file, too (a target rate that cannot be met).
    Raises:
        BudgetError: the range of the picture's files does not hold the budget; says the range.
    """
    sizes = _Sizes(codec, picture)
    smallest, largest = len(sizes[0]), len(sizes[LEVEL_CODES if codec.has_levels else 0])
    if max_bytes < smallest or (max_bytes > largest and not at_most):
        pixels = picture.file.height * picture.file.width
        raise BudgetError(
            f"{max_bytes:,} bytes ({8 * max_bytes / pixels:.4f} bpp) are outside what these weights can do for this "
            f"picture: {smallest:,} to {largest:,} bytes ({8 * smallest / pixels:.4f} to {8 * largest / pixels:.4f} bpp)"
        )
    if not codec.has_levels or max_bytes < len(sizes[1]):
        least = f"; the smallest file with a residual has {len(sizes[1]):,} bytes" if codec.has_levels else ""
        return Fitted(sizes[0], 0, f"base alone{least}" if max_bytes > smallest else None)
    level = _largest_below(sizes, max_bytes)
    return Fitted(sizes[level], level)


def _largest_below(sizes: "_Sizes", max_bytes: int) -> int:
    """Level of the largest file within the budget: bisection, then the levels around it."""
    low, high = 1, LEVEL_CODES + 1  # low fits; high does not, or does not exist
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(sizes[middle]) <= max_bytes else (low, middle)
    near = range(max(1, low - NEIGHBOURS), min(LEVEL_CODES, low + NEIGHBOURS) + 1)
    fitting = [level for level in near if len(sizes[level]) <= max_bytes]
    return max(fitting, key=lambda level: len(sizes[level]))


class _Sizes(dict):
    """Files of a picture by level, written when first asked for."""

    def __init__(self, codec: Codec, picture: Analysed):
        super().__init__()
        self.codec, self.picture = codec, picture

    def __missing__(self, level: int) -> bytes:
        self[level] = self.codec.write(self.picture, level)
        return self[level]
