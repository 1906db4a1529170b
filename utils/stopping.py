"""Ending long work between two of its steps when the system or the user asks for it."""

import os
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


def stop_for_parent_only(_: int = 0) -> None:
    """For a process that serves another: of the signals that go to the whole group, the other decides what to do.

    SIGINT is ignored. SIGTERM ends the process if its parent sent it, as `multiprocessing` does at exit with the
    children that are left before it waits for them without limit; anybody else's is ignored, where the system tells
    who sent it (Linux).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads inherit it
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
