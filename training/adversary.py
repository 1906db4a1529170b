"""The adversary of any stage: a discriminator that is trained beside the networks whose pictures it judges."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.losses import PatchDiscriminator, adaptive_factor, hinge_discriminator, hinge_generator
from training.optimiser import Optimiser
from training.parallel import accumulate, parallel, settle, synchronised
from training.projected import ProjectedDiscriminator
from training.speed import Speed
from training.stage_config import StageParams
from utils import distributed

DISCRIMINATORS = {"patch": PatchDiscriminator, "projected": ProjectedDiscriminator}


class Adversary:
    """A PatchGAN, or a discriminator on fixed features, with hinge losses and VQGAN's adaptive factor (Esser et al. 2021, Eqs. 6 and 7).

        L_G = -E D(X^)        L_D = (E max(0, 1 - D(X)) + E max(0, 1 + D(X^))) / 2
        factor = w lambda,    lambda = |grad L| / (|grad L_G| + 1e-4) at the last trained layer, or 1

    Pictures are N x 3 x H x W in about [-1, 1].
    """

    def __init__(self, params: StageParams, like: Tensor, speed: Speed):
        self.params, self.speed = params.adversary, speed
        self.discriminator = DISCRIMINATORS[self.params.kind]().to(like.device, like.dtype)
        speed.prepare(self.discriminator)
        self.model = parallel(self.discriminator, speed.graphs)
        self.optimiser = Optimiser(
            self.discriminator.named_parameters(), params.optim, params.iterations, speed.fused_adamw
        )

    @property
    def recordable(self) -> bool:
        """Whether a graph can be recorded of its passes: a projected one draws numbers on the host, and the adaptive factor
        takes gradients of all ranks."""
        return self.params.kind == "patch" and not (self.params.adaptive and distributed.world_size() > 1)

    def joins(self, at: float) -> bool:
        """Whether it takes part at a place in the stage, in iterations."""
        return at >= self.params.start

    def settle(self, image: Tensor) -> None:
        settle(self.model, lambda: self.model(image).mean())

    def generator_term(self, restored: Tensor) -> Tensor:
        """L_G with the discriminator's weights held constant: gradients reach the pictures alone."""
        constant = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        with self.speed.autocast():
            return hinge_generator(functional_call(self.discriminator, constant, (restored,)))

    def factor(self, loss: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
        """w lambda, from the gradients of all ranks; the graphs of both terms stay."""
        if not self.params.adaptive:
            return torch.full_like(loss, self.params.weight)
        gradients = [torch.autograd.grad(term, last_layer, retain_graph=True)[0] for term in (loss, adversarial)]
        return self.params.weight * adaptive_factor(*distributed.all_reduce_mean(torch.stack(gradients)))

    def judge(self, image: Tensor, restored: Tensor, parts: list[slice]) -> Tensor:
        """L_D of a batch in micro-batches; its gradient is accumulated for `optimiser.update`."""
        total: dict[str, Tensor] = {}
        self.optimiser.zero_grad()
        for part in parts:
            with synchronised(self.model, part is parts[-1]):
                with self.speed.autocast():
                    scores = self.model(torch.cat([image[part], restored[part]]))
                term = hinge_discriminator(*scores.chunk(2))
                share = len(image[part]) / len(image)
                (share * term).backward()
            accumulate(total, {"discriminator": term}, share)
        return total["discriminator"]

    def state_dict(self) -> dict:
        return {"discriminator": self.discriminator.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimiser.load_state_dict(state["optimiser"])
