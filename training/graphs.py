"""CUDA graphs of a step's passes: thousands of small programs, forward and backward, started as one.

Batches of one kind run the same programs on the same memory: the first runs as always, the second records, later ones
replay. Results and gradients lie in the graph's memory, and hold until the next step.
"""

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from datapipe.pictures import Batch

Passes = Callable[[Batch], Any]


class Graphs:
    """Replays the passes of a step where that can be; otherwise runs them.

    Attributes:
        failed: why there are no graphs any more; None while there are.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        """Args: parameters: all that get a gradient."""
        self.parameters, self.failed = parameters, None
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, Passes] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # of memory, for all graphs: they replay one after the other

    def __call__(self, passes: Passes, batch: Batch, kind: Hashable) -> Any:
        """What passes(batch) gives; the gradients are there as after it.

        Args:
            passes: forward and backward. Nothing in it waits for the device, or takes from the host what changes.
            kind: all that decides which programs run, beside the sizes.
        """
        kind = kind, batch.image.shape, *(part.shape for part in batch.draws.values())
        if self.failed or kind not in self._seen:
            self._seen.add(kind)
            return self.run(lambda: passes(batch))
        if kind not in self._recorded:
            try:
                self._recorded[kind] = self._record(passes, batch)
            except RuntimeError as error:  # memory among them
                self._fail(str(error).strip().splitlines()[0])
                return self.run(lambda: passes(batch))
        return self._recorded[kind](batch)

    def _record(self, passes: Passes, batch: Batch) -> Passes:
        fixed = Batch(batch.image.clone(), batch.position, {name: part.clone() for name, part in batch.draws.items()})
        result, replay = self.capture(lambda: passes(fixed))
        gradients = [parameter.grad for parameter in self.parameters]

        def replayed(batch: Batch) -> Any:
            fixed.image.copy_(batch.image)
            for name, part in fixed.draws.items():
                part.copy_(batch.draws[name])
            replay()
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            return result

        return replayed

    def run(self, work: Callable[[], Any]) -> Any:
        """Results of work, on the stream that graphs are captured on: autograd's nodes, and libraries, remember theirs."""
        here = torch.cuda.current_stream()
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = work()
        here.wait_stream(self._stream)
        return result

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Results of work, which come with the first replay, and the replay. Raises RuntimeError where none can be."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # A loader's thread pins memory meanwhile, which a capture of the whole process would forbid.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return result, graph.replay

    def _without_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _fail(self, reason: str) -> None:
        self.failed = reason
        self._recorded.clear()
        self._without_gradients()
        print(f"graphs of the step are left out, it runs as always: {reason}", file=sys.stderr)
