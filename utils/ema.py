"""Exponential moving average of a network's tensors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def in_layout_of(like: Tensor, value: Tensor) -> Tensor:
    """The same values, copied where they lie otherwise: one tensor in another layout keeps all from one fused kernel."""
    return value if value.stride() == like.stride() else torch.empty_like(like).copy_(value)


class Ema:
    """average <- d * average + (1 - d) * value, with d = min(decay, (1 + n) / (10 + n)) at update n.

    The short start keeps the average from remembering the initial weights for 1 / (1 - decay) steps. Everything in
    the state dict is averaged, code books included, so that the averaged networks belong together.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.average = {key: value.detach().clone() for key, value in network.state_dict().items()}
        # The network's own, whatever becomes of their memory: its state dict would be built anew in every step.
        self._values = [(key, v) for key, v in network.state_dict(keep_vars=True).items() if v.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network as it is."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        ours = [self.average[key] for key, _ in self._values]
        theirs = [in_layout_of(average, value) for average, (_, value) in zip(ours, self._values, strict=True)]
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    def copy_to(self, network: nn.Module) -> None:
        network.load_state_dict(self.average, strict=True)

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """The averages in the place of the network's own tensors, which come back afterwards bit for bit."""
        own = {key: value.detach().clone() for key, value in network.state_dict().items()}
        self.copy_to(network)
        try:
            yield
        finally:
            network.load_state_dict(own, strict=True)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, int | dict[str, Tensor]]) -> None:
        self.updates = state["updates"]
        for key, value in self.average.items():
            value.copy_(state["average"][key])
