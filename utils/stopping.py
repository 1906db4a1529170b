"""Ending long work between two of its steps when the system or the user asks for it."""

import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What asks, and for how many seconds the same request may arrive once more: schedulers signal a launcher and its
# processes, and the launcher then signals them again.
ASKING = {signal.SIGTERM: 10.0, signal.SIGINT: 0.5}  # what schedulers send, and Ctrl-C
if hasattr(signal, "SIGHUP"):
    ASKING[signal.SIGHUP] = 10.0  # a terminal that is closed
WATCH = 0.5  # seconds between two looks at the parent


class StopRequest:
    """While entered, the first signal that asks to stop is noted for the work to look at; another ends it as ever.

    Signals that the process was started to ignore (`nohup`) stay ignored.

    Attributes:
        number: of the signal that came, or None.
    """

    def __init__(self):
        self.number: int | None = None
        self._came = 0.0  # seconds of the monotonic clock
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._came = number, time.monotonic()
        elif time.monotonic() - self._came > ASKING[number]:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            asking = [number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in asking}
        return self

    def __exit__(self, *_) -> None:
        self._restore()


@contextmanager
def signals_held() -> Iterator[None]:
    """Let the signals that ask to stop wait. Processes that are forked here are born with them waiting."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_for_parent_only(_: int = 0) -> None:
    """For a process that serves another, started with `signals_held`: the other decides about signals to the whole group.

    They are ignored, but for a SIGTERM that the parent sent, as `multiprocessing` does at exit with the children that
    are left before it waits for them without limit (`end_children_at_exit`). A process that was forked ends with its
    parent, however that ended. Where the system does not tell who sends a signal (macOS), SIGTERM ends it as ever.
    """
    for number in ASKING.keys() - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})  # threads inherit it
        threading.Thread(target=_end_with_parent, daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _end_with_parent() -> None:
    above, parent = os.getppid(), multiprocessing.parent_process().pid  # not one where a server starts processes
    while os.getppid() == above:
        came = signal.sigtimedwait({signal.SIGTERM}, WATCH)
        if came and came.si_pid == parent:
            break
    os._exit(0)


def end_children_at_exit() -> None:
    """Have this process, at its end, ask its daemonic children to end until they do.

    `multiprocessing` asks once, and a signal that comes while one like it waits is lost.
    """
    multiprocessing.util.Finalize(None, _end_children, exitpriority=1)


def _end_children() -> None:
    for child in multiprocessing.active_children():
        while child.daemon and child.is_alive():
            child.terminate()
            child.join(0.1)
