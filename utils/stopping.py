"""Ending long work between two of its steps when the system or the user asks for it."""

import signal
import threading
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT)  # what schedulers send, and Ctrl-C


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is noted for the work to look at; a second one ends the process as ever.

    Attributes:
        number: of the signal that came, or None.
    """

    def __init__(self):
        self.number: int | None = None
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._note) for number in ASKING}
        return self

    def __exit__(self, *_) -> None:
        self._restore()


def ignore_stops(_: int = 0) -> None:
    """For a process that serves another: the signals go to the whole group, and the other decides when to end."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
