"""Errors that speak to a user: the command line prints the message alone and exits with status 1."""


def out_of_memory(error: BaseException) -> bool:
    """Whether Python or PyTorch has run out of memory; on a CPU PyTorch raises a plain RuntimeError then."""
    told = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in told or "out of memory" in told)
    )


class DiffoError(Exception):
    """Something the user can mend: a file, an option, a checkpoint. The message names it and says what to do."""


class NotFinite(DiffoError):
    """A loss, gradient or result that is NaN or infinite; nothing was updated with it."""


class PictureError(DiffoError):
    """A picture that cannot be read, or is too small or too large to be coded."""


class BitstreamError(DiffoError):
    """A `.dfo` file that is damaged, cut, extended, foreign, or of a newer version."""


class BudgetError(DiffoError):
    """A rate or a number of bytes that the weights cannot meet; the message gives the range that they can."""


class CheckpointError(DiffoError):
    """A checkpoint that is missing, does not fit the configuration, or is not the one that a file needs."""


class ConfigError(DiffoError):
    """A configuration with an unknown key, a missing key, or a value that cannot work.

    Attributes:
        key: dotted, of the value where what it names shows that it cannot work; the message does not tell it yet.
    """

    def __init__(self, told: str, key: str | None = None):
        super().__init__(told)
        self.key = key
