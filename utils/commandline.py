"""How every command of the project ends: one line for what the user can mend, never a traceback for it."""

import argparse
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from utils.errors import DiffoError, out_of_memory
from utils.files import disk_is_full
from utils.version import __version__

FAILED, INTERRUPTED = 1, 130
Number = TypeVar("Number", int, float)


class _Parser(argparse.ArgumentParser):
    """argparse's, where sub-commands, whose parsers are of this class, take no abbreviated options either."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, allow_abbrev=False)


def command_parser(description: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser for the options of a command: described as written, with `--version`, options never abbreviated."""
    parser = _Parser(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"DiffO {__version__}")
    return parser


def answer(work: Callable[..., int | None], *args) -> int:
    """Call work(*args); its result is the exit status (None: 0).

    It is 1 for a DiffoError, whose message is printed, for what system and memory refuse, and for output that cannot be
    written. File names that are no text are printed escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    status = _status(work, args)
    return _status(lambda: sys.stdout and sys.stdout.flush(), ()) or status


def _status(work: Callable[..., int | None], args: tuple) -> int:
    try:
        return work(*args) or 0
    except DiffoError as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader has gone and asks for nothing more
        _settle_output()
    except OSError as error:
        if error.filename is not None:
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        elif disk_is_full(error):
            print(f"error: output or a temporary file cannot be written: {error.strerror}", file=sys.stderr)
            _settle_output()
        else:
            raise
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        told = (str(error).splitlines() or ["of this process"])[0]
        print(f"error: not enough memory ({told})", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return FAILED


@contextmanager
def loading() -> Iterator[None]:
    """For imports that take seconds: Ctrl-C ends the process at once, as extension modules may swallow its exception."""

    def end(*_) -> None:
        os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _settle_output() -> None:
    """Write out what stdout keeps. Where that fails, nothing is kept: Python would meet it again at exit."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command_line(program: str, argv: list[str] | None) -> str:
    """The line that was given, to be pasted into a shell, with torchrun where that has started this process.

    Args:
        program: a file, or -m and a module. argv: None stands for the process's own arguments.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    launcher = ["torchrun", f"--nproc_per_node={local}"] if local else ["python"]
    return shlex.join([*launcher, *program.split(), *(sys.argv[1:] if argv is None else argv)])


def number(kind: Callable[[str], Number], allowed: Callable[[Number], bool], words: str) -> Callable[[str], Number]:
    """An argparse type: a number that is allowed; `words` say which ones are."""

    def read(text: str) -> Number:
        value = kind(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number
    return read


positive = number(int, lambda value: value >= 1, "a positive number")
