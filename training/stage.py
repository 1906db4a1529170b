"""A stage of training: which networks learn, and the equations of their loss.

A stage knows nothing of steps, files or the command line: training/step.py runs one update of it, the trainer feeds it
batches and saves what is to be saved.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datapipe.draws import DrawParams, draw_batch
from datapipe.pictures import Batch
from models.codec import Codec
from models.losses import chroma_distortion
from training.config import TrainConfig
from training.perceptual import perceptual_terms
from training.speed import Speed
from utils.ema import Ema


@dataclass(frozen=True)
class Evaluated:
    """A picture as a stage decodes it.

    Attributes:
        loss: the stage's own, without its adversarial and auxiliary terms; the smallest mean is the best.
        results: by suffix of the score's name: decoded picture, 1 x 3 x H x W in about [-1, 1], and bits per pixel
            (None where there is no rate).
    """

    loss: float
    results: dict[str, tuple[Tensor, float | None]]


class Restored(NamedTuple):
    """Output of a forward pass, or the part of it that a step keeps: image, N x 3 x H x W."""

    image: Tensor


class Stage(ABC):
    """One stage of a run.

    Attributes:
        name: of its block in the configuration.
        begins, finishes: a pass over pictures comes before its first step (`begin`), or after its last (`finish`), which
            cannot be taken back.
        network: computes the forward pass, under DDP. trained: the networks that learn and are averaged.
        frozen: networks of the codec that a checkpoint keeps beside those that learn.
        last_layer: weight that the adversary's adaptive factor is measured at.
        factors: of the terms in the loss, L = sum of factor x term.
        shares: of the learning rate, by the starts of parameters' names in `network`; 1 elsewhere.
    """

    name: str
    finishes = False
    begins = False
    network: nn.Module
    trained: nn.Module
    frozen: tuple[str, ...] = ()
    last_layer: nn.Parameter
    factors: dict[str, float]
    shares: dict[tuple[str, ...], float] = {}

    def __init__(self, config: TrainConfig, codec: Codec, device: torch.device):
        self.params, self.seed, self.device, self.codec = getattr(config, self.name), config.seed, device, codec
        self.speed = Speed(config.speed, device)
        self.perceptual = perceptual_terms(
            self.params.perceptual,
            untrained=device.type == "meta",  # for shapes alone
            tf32=self.speed.perceptual_tf32,
            window=self.params.vgg_window,
        )
        self.speed.prepare(self.perceptual)

    def shared_factors(self) -> dict[str, float]:
        """Factors of the terms that all stages have."""
        p = self.params
        factors = {"distortion": p.distortion_weight, "chroma": p.chroma_weight} | p.perceptual
        return {name: factor for name, factor in factors.items() if factor or name == "distortion"}

    def shared_terms(self, image: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Terms of a picture and its original that all stages have, but for the distortion."""
        terms = {name: term(image, target) for name, term in self.perceptual.items()}
        return terms | ({"chroma": chroma_distortion(image, target)} if self.params.chroma_weight else {})

    # The equations -----------------------------------------------------------------------------------------------

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The forward pass through `network`, or DDP around it; the result has an `image`, N x 3 x H x W."""

    @abstractmethod
    def terms(self, out: Any, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss, scalars averaged over the batch; `auxiliary`, if there is one, is of no picture."""

    def losses(self, out: Any, batch: Batch) -> dict[str, Tensor]:
        """The terms and `loss`, L = sum of factor x term; without an adversary, and without the auxiliary term."""
        terms = self.terms(out, batch)
        return terms | {"loss": sum(factor * terms[name] for name, factor in self.factors.items())}

    @abstractmethod
    def evaluate(self, image: Tensor, position: int) -> Evaluated:
        """One picture of validation, 1 x 3 x H x W, sides multiples of 16, with the weights as they are."""

    # Around a step -----------------------------------------------------------------------------------------------

    def draw_params(self, height: int, width: int) -> DrawParams | None:
        """Random numbers that a picture of this size needs; None where it needs none."""
        return None

    def drawn(self, positions: Sequence[int], size: tuple[int, int]) -> dict[str, Tensor]:
        """The random numbers of pictures of one size at positions of the stream."""
        params = self.draw_params(*size)
        return draw_batch(params, self.seed, positions) if params else {}

    def kind(self, batch: Batch) -> Hashable | None:
        """All that decides which programs the passes over a batch run, beside its sizes; None where they take more from
        the host than the batch on the device, so that no graph can be recorded of them."""
        return ()

    def kept(self, out: Any, batch: Batch) -> Any:
        """Results of a micro-batch that are needed after its backward pass, without gradient."""
        return Restored(out.image.detach())

    def gathered(self, seen: list, step: int) -> Any:
        """Statistics over the micro-batches and ranks, None where there are none; their `dead` is the flag, bool (),
        that `follow` is told."""
        return None

    def follow(self, statistics: Any, dead: bool, step: int, averages: Ema) -> dict[str, Tensor | float]:
        """Updates other than by gradients, after the optimiser's and before the averages'; scalars to log."""
        return {}

    def logs(self, seen: list) -> dict[str, float]:
        """Further scalars of a step that is logged; a collective."""
        return {}

    def remark(self, batch: Batch) -> str | None:
        """A line to tell of the stage's first batch, if there is anything to tell."""
        return None

    def begin(self, batches: Iterable[Batch]) -> str:
        """Start the networks from pictures, the same on every rank; a line to tell."""
        raise NotImplementedError(f"stage {self.name} begins with its first step")

    def finish(self, batches: Iterable[Batch]) -> None:
        """End the stage: the averaged weights are in place of the trained ones, to be changed a last time."""
        raise NotImplementedError(f"stage {self.name} ends with its last step")

    def networks(self, state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """A state dict of `trained` by the network of the codec."""
        parted: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            network, name = key.split(".", 1)
            parted.setdefault(network, {})[name] = value
        return parted
