"""Ending long work between two of its steps when the system or the user asks for it."""

import os
import signal
import time
from types import FrameType

ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
STOPPED = 128  # and the signal's number: the exit status that shells give to what a signal has ended
GRACE = 5.0  # seconds in which schedulers and launchers repeat the same request


class StopRequest:
    """While entered, the first signal that asks to stop is noted in `number` (None before); a later one ends as ever.

    One that comes soon after the first may be the same request, except a second Ctrl-C, unless torchrun repeats it.

    Signals that the process was started to ignore (`nohup`) stay ignored.
    """

    number: int | None = None

    def __enter__(self) -> "StopRequest":
        self._launched = "RANK" in os.environ
        asking = [number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in asking}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number is None:
            self.number, self._came = number, time.monotonic()
        elif time.monotonic() - self._came > GRACE or (number == self.number == signal.SIGINT and not self._launched):
            self.__exit__()
            os.kill(os.getpid(), number)
