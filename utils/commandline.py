"""How every command of the project ends: one line for what the user can mend, never a traceback for it."""

import argparse
import os
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
    except BrokenPipeError:  # whoever read our output has gone; Python must not complain about it at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
