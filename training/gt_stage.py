"""Stage `gt`: the image autoencoder. The step reads as the equations: forward, losses, backward, averages.

A stage knows its networks, optimisers and losses. It knows nothing of files, folders or the command line; the trainer
feeds it batches and saves what it asks to have saved.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from models.codec import Codec
from models.losses import (
    PatchDiscriminator,
    adaptive_weight,
    chroma_distortion,
    distortion,
    hinge_discriminator,
    hinge_generator,
)
from training.config import GtParams, TrainConfig
from training.optimiser import Optimiser, finite, parallel
from training.perceptual import perceptual_term
from training.speed import Speed
from utils import distributed
from utils.ema import Ema


class GtStage:
    """Stage `gt`: L = w_d |X - X^| + w_p perceptual + w_a lambda hinge (VQGAN, Esser et al. 2021), continuous latent."""

    name = "gt"

    def __init__(self, config: TrainConfig, codec: Codec, device: torch.device):
        p: GtParams = config.gt
        self.params, self.seed, self.device, self.codec = p, config.seed, device, codec
        self.network = codec.autoencoder
        self.speed = Speed(config.speed, device)
        self.speed.prepare(self.network)
        self.network.train().requires_grad_(True)
        if hasattr(self.network, "quantize"):
            self.network.quantize.requires_grad_(False)
        self.distortion = F.l1_loss if p.distortion == "l1" else distortion
        self.perceptual = perceptual_term(p.perceptual)
        self.ema = Ema(self.network, p.ema)
        self.optimiser = Optimiser(self.network.named_parameters(), p.optim, p.iterations, self.speed.fused_adamw)
        self.model = parallel(self.network)
        self.discriminator = (
            PatchDiscriminator().to(device, self.network.decoder.last_layer.dtype) if p.adversarial_weight else None
        )
        if self.discriminator:
            self.speed.prepare(self.discriminator)
            self.critic = parallel(self.discriminator)
            self.critic_optimiser = Optimiser(
                self.discriminator.named_parameters(), p.optim, p.iterations, self.speed.fused_adamw
            )

    def step(self, image: Tensor, positions: Tensor, step: int) -> tuple[dict[str, float], list[Tensor]]:
        """One update; returns the scalars to log and the rows of pictures to show."""
        p = self.params
        adversarial = self.discriminator is not None and step >= p.adversarial_start
        with self.speed.autocast():
            restored = self.model(image)  # X^ = D(E(X))
        terms = {
            "distortion": self.distortion(restored, image),
            "perceptual": self.perceptual(restored, image),
        }
        loss = p.distortion_weight * terms["distortion"] + p.perceptual_weight * terms["perceptual"]
        if p.chroma_weight:
            terms["chroma"] = chroma_distortion(restored, image)
            loss = loss + p.chroma_weight * terms["chroma"]
        if adversarial:
            terms["adversarial"] = hinge_generator(self._judged(restored))
            loss = loss + p.adversarial_weight * self._lambda(loss, terms["adversarial"]) * terms["adversarial"]
        finite(terms, self.name, step)
        logs = {"loss": loss.item(), "grad_norm": self.optimiser.step(loss, step), "lr": self.optimiser.lr(step)}
        if adversarial:
            with self.speed.autocast():
                scores = self.critic(torch.cat([image, restored.detach()]))
            terms["discriminator"] = hinge_discriminator(*scores.chunk(2))
            finite(terms, self.name, step)
            self.critic_optimiser.step(terms["discriminator"], step)
        self.ema.update(self.network)
        return logs | {name: term.item() for name, term in terms.items()}, [image, restored.detach()]

    def _judged(self, image: Tensor) -> Tensor:
        """The discriminator's logits with its weights held constant: gradients reach the image alone."""
        weights = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        with self.speed.autocast():
            return functional_call(self.discriminator, weights, (image,))

    def _lambda(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        last = self.network.decoder.last_layer
        gradients = [torch.autograd.grad(term, last, retain_graph=True)[0] for term in (reconstruction, adversarial)]
        return adaptive_weight(*(distributed.all_reduce_mean(g) for g in gradients))

    @torch.no_grad()
    def finish(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Keep the averaged weights and fold the latent's statistics into them (codec.md section 4)."""
        self.ema.copy_to(self.network)
        self.network.eval()
        moments, seen = 0, 0
        for image, _ in batches:
            x = self.network.encode(image.to(self.device)).double()
            moments = moments + torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
            seen += x.numel() // x.shape[1]
        moments = distributed.all_reduce_sum(moments) / (seen * distributed.world_size())
        mean = moments[0]
        std = (moments[1] - mean.square()).clamp(min=1e-8).sqrt()
        self.network.fold_statistics(mean.float(), std.float())
        self.ema = Ema(self.network, self.params.ema)

    def states(self) -> dict[str, dict[str, Tensor]]:
        """What the checkpoints of this stage hold: averaged state dicts by network."""
        return {"autoencoder": self.ema.average}

    def state_dict(self) -> dict:
        state = {"ema": self.ema.state_dict(), "optimiser": self.optimiser.adamw.state_dict()}
        if self.discriminator:
            state["discriminator"] = self.discriminator.state_dict()
            state["critic_optimiser"] = self.critic_optimiser.adamw.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        self.ema.load_state_dict(state["ema"])
        self.optimiser.adamw.load_state_dict(state["optimiser"])
        if self.discriminator:
            self.discriminator.load_state_dict(state["discriminator"])
            self.critic_optimiser.adamw.load_state_dict(state["critic_optimiser"])
