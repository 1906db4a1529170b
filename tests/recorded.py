"""Graphs of a training step that need no GPU."""

import torch

from training.graphs import Graphs


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return tensors(list(value.values()))
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in tensors(each)]
    return tensors(vars(value)) if hasattr(value, "__dict__") else []


class Fixed(Graphs):
    """Replays on the CPU as a graph does: from memory of its own, into memory of its own.

    Attributes:
        in_all: graphs that all of them have recorded in this process.
    """

    in_all = 0

    def __init__(self, parameters, broken: bool = False):
        super().__init__(parameters)
        self.recorded, self.replayed, self.broken = 0, 0, broken

    def run(self, work):
        return work()

    def capture(self, work):
        if self.broken:
            work()
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        self.recorded += 1
        Fixed.in_all += 1
        result, gradients = work(), [parameter.grad for parameter in self.parameters]

        def replay():
            self.replayed += 1
            self._without_gradients()
            again = [*tensors(work()), *(p.grad for p in self.parameters if p.grad is not None)]
            kept = [*tensors(result), *(gradient for gradient in gradients if gradient is not None)]
            with torch.no_grad():
                for own, new in zip(kept, again, strict=True):
                    own.copy_(new)
            self._without_gradients()  # a graph writes memory, and knows no parameter

        return result, replay
