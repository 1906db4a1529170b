"""How far a stage is, by iterations or by the clock."""

import time

from training.stage_config import StageParams


class Progress:
    """Place in a stage's schedules, in iterations.

    By iterations, `at` counts the updates done. By the clock (`minutes`), it is the share of the time that has passed,
    times `iterations`: warm-up, start of the adversary and cosine become shares of the time. The clock is the main
    process's; every rank is told it with the flags of a step.

    Attributes:
        step: updates done. seconds: that the stage has taken, all its runs together, as far as told.
    """

    def __init__(self, params: StageParams, step: int = 0, seconds: float = 0.0):
        self.iterations, self.minutes = params.iterations, params.minutes
        self.step, self.seconds = step, seconds
        self._began = time.monotonic() - seconds

    def clock(self) -> float:
        """Seconds that the stage has taken until now."""
        return time.monotonic() - self._began

    def advance(self, seconds: float) -> None:
        """One update more, `seconds` of the main process's clock after the start."""
        self.step, self.seconds = self.step + 1, seconds

    @property
    def at(self) -> float:
        return self.step if self.minutes is None else self.iterations * min(1.0, self.seconds / (60 * self.minutes))

    @property
    def done(self) -> bool:
        return self.at >= self.iterations
