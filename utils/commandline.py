"""How every command of the project ends: one line for what the user can mend, never a traceback for it."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable

from utils.errors import DiffoError, out_of_memory

FAILED, INTERRUPTED = 1, 130
OUTPUT = (errno.ENOSPC, errno.EIO, errno.EFBIG)  # what writing to stdout may meet


def answer(work: Callable[..., int | None], *args) -> int:
    """Call work(*args); its result is the exit status (None: 0).

    It is 1 for a DiffoError, whose message is printed, and for what system and memory refuse. File names that are no
    text are printed escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = work(*args) or 0
        sys.stdout.flush()  # what fails there must not fail at exit
        return status
    except DiffoError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # whoever read our output has gone
        _drop_output()
        return FAILED
    except OSError as error:
        if error.filename is None:
            if error.errno not in OUTPUT:
                raise
            _drop_output()
        print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return FAILED
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        told = (str(error).splitlines() or ["of this process"])[0]
        print(f"error: not enough memory ({told})", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _drop_output() -> None:
    """What is still to be written to stdout must not fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
