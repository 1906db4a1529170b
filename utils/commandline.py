"""How every command of the project ends: one line for what the user can mend, never a traceback for it."""

import sys
from collections.abc import Callable

from utils.errors import DiffoError

FAILED, INTERRUPTED = 1, 130


def answer(work: Callable[..., int | None], *args) -> int:
    """Call work(*args); its result is the exit status (None: 0), as is 1 for a DiffoError, whose message is printed."""
    try:
        return work(*args) or 0
    except DiffoError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
