"""Stage `gt`: the image autoencoder. The step reads as the equations: forward, losses, backward, averages.

A stage knows its networks, optimisers and losses. It knows nothing of files, folders or the command line; the trainer
feeds it batches and saves what it asks to have saved.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
from training.optimiser import Optimiser, accumulate, averaged, blank, micro_batches, parallel, settle, synchronised
from training.perceptual import perceptual_term
from training.speed import Speed
from training.validation import Evaluated
from utils import distributed
from utils.ema import Ema


class GtStage:
    """Stage `gt`: L = w_d |X - X^| + w_p perceptual + w_a lambda hinge (VQGAN, Esser et al. 2021), continuous latent."""

    name = "gt"
    finishes = True  # with what cannot be taken back: finish() averages and rescales the weights

    def __init__(self, config: TrainConfig, codec: Codec, device: torch.device):
        p: GtParams = config.gt
        self.params, self.seed, self.device, self.codec = p, config.seed, device, codec
        self.trained = codec.autoencoder
        self.speed = Speed(config.speed, device)
        self.speed.prepare(self.trained)
        self.trained.train().requires_grad_(True)
        if hasattr(self.trained, "quantize"):
            self.trained.quantize.requires_grad_(False)
        self.distortion = F.l1_loss if p.distortion == "l1" else distortion
        self.perceptual = perceptual_term(p.perceptual)
        if isinstance(self.perceptual, nn.Module):
            self.speed.prepare(self.perceptual)
        self.ema = Ema(self.trained, p.ema)
        self.optimiser = Optimiser(self.trained.named_parameters(), p.optim, p.iterations, self.speed.fused_adamw)
        self.model = parallel(self.trained)
        self.discriminator = (
            PatchDiscriminator().to(device, self.trained.decoder.last_layer.dtype) if p.adversarial_weight else None
        )
        if self.discriminator:
            self.speed.prepare(self.discriminator)
            self.critic = parallel(self.discriminator)
            self.critic_optimiser = Optimiser(
                self.discriminator.named_parameters(), p.optim, p.iterations, self.speed.fused_adamw
            )
        settle(self.model, lambda: self.rehearse(self.blank()))
        if self.discriminator:
            settle(self.critic, lambda: self.critic(self.blank()).mean())

    def step(self, image: Tensor, positions: Tensor, step: int) -> tuple[dict[str, float], list[Tensor]]:
        """One update; returns the scalars to log and the rows of pictures to show.

        Raises:
            NotFinite: a term or the gradient is not; nothing was updated.
        """
        adversarial = self.discriminator is not None and step >= self.params.adversarial_start
        parts = micro_batches(len(image), self.params.microbatch)
        weight = self._first_pass(image, parts) if adversarial and len(parts) > 1 else None
        terms, rows = {}, []
        self.optimiser.zero_grad()
        for part in parts:
            with synchronised(self.model, part is parts[-1]):
                with self.speed.autocast():
                    restored = self.model(image[part])  # X^ = D(E(X))
                own = self.losses(restored, image[part], adversarial)
                if adversarial:
                    weight = self._weight(self._last_gradients(own)) if weight is None else weight
                    own["loss"] = own["loss"] + weight * own["adversarial"]
                share = len(restored) / len(image)
                (share * own["loss"]).backward()
            accumulate(terms, own, share)
            rows.append(restored.detach())
        if adversarial:
            terms["discriminator"] = self._judge(image, torch.cat(rows), parts)
        logs = averaged(terms, self.name, step)
        logs |= {"grad_norm": self.optimiser.clip(self.name, step), "lr": self.optimiser.lr(step)}
        if adversarial:
            logs |= {"adversarial_weight": weight.item()}
            logs |= {"discriminator_grad_norm": self.critic_optimiser.clip(self.name, step)}
            self.critic_optimiser.update(step)
        self.optimiser.update(step)
        self.ema.update(self.trained)
        return logs, [image, torch.cat(rows)]

    def losses(self, restored: Tensor, image: Tensor, adversarial: bool) -> dict[str, Tensor]:
        """The terms, means over the pictures given, and `loss`, their weighted sum without the adversarial one."""
        p = self.params
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
        return terms | {"loss": loss}

    def _judged(self, image: Tensor) -> Tensor:
        """The discriminator's logits with its weights held constant: gradients reach the image alone."""
        weights = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        with self.speed.autocast():
            return functional_call(self.discriminator, weights, (image,))

    def _judge(self, image: Tensor, restored: Tensor, parts: list[slice]) -> Tensor:
        """The discriminator's loss; its gradient is accumulated, and applied with the others."""
        total: dict[str, Tensor] = {}
        self.critic_optimiser.zero_grad()
        for part in parts:
            with synchronised(self.critic, part is parts[-1]):
                with self.speed.autocast():
                    scores = self.critic(torch.cat([image[part], restored[part]]))
                term = hinge_discriminator(*scores.chunk(2))
                share = len(image[part]) / len(image)
                (share * term).backward()
            accumulate(total, {"discriminator": term}, share)
        return total["discriminator"]

    def _first_pass(self, image: Tensor, parts: list[slice]) -> Tensor:
        """The adversarial weight of a batch in pieces: it needs the whole batch before the first backward pass."""
        gradients = 0
        for part in parts:
            with synchronised(self.model, last=False):
                with self.speed.autocast():
                    restored = self.model(image[part])
                own = self.losses(restored, image[part], adversarial=True)
            gradients = gradients + len(image[part]) / len(image) * self._last_gradients(own)
            del restored, own  # the graph, which is retained, before the next micro-batch has its own
        return self._weight(gradients)

    def _last_gradients(self, terms: dict[str, Tensor]) -> Tensor:
        """Gradients of the reconstruction's loss and of the adversarial term at the decoder's last layer, stacked."""
        last = self.trained.decoder.last_layer
        terms = (terms["loss"], terms["adversarial"])
        return torch.stack([torch.autograd.grad(term, last, retain_graph=True)[0] for term in terms])

    def _weight(self, gradients: Tensor) -> Tensor:
        """w_a lambda, from the gradients of all ranks."""
        return self.params.adversarial_weight * adaptive_weight(*distributed.all_reduce_mean(gradients))

    @torch.no_grad()
    def evaluate(self, image: Tensor, position: int) -> Evaluated:
        """One picture of validation, 1 x 3 x H x W, with the weights as they are."""
        restored = self.trained(image)
        return Evaluated(self.losses(restored, image, adversarial=False)["loss"].item(), {"": (restored, None)})

    def rehearse(self, image: Tensor) -> Tensor:
        """The loss of a micro-batch, with the adversarial term, for what its backward pass would need."""
        with self.speed.autocast():
            restored = self.model(image)
        terms = self.losses(restored, image, self.discriminator is not None)
        return terms["loss"] + terms.get("adversarial", 0)

    def blank(self) -> Tensor:
        """Pictures to rehearse with."""
        return blank(self.params, self.trained.decoder.last_layer)

    @torch.no_grad()
    def finish(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Keep the averaged weights, and rescale the latent to mean 0 and deviation 1, as `scale_input` assumes, in them."""
        self.ema.copy_to(self.trained)
        self.trained.eval()
        moments, seen = 0, 0
        for image, _ in batches:
            x = self.trained.encode(image.to(self.device)).double()
            moments = moments + torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
            seen += x.numel() // x.shape[1]
        moments = distributed.all_reduce_sum(moments) / (seen * distributed.world_size())
        mean = moments[0]
        std = (moments[1] - mean.square()).clamp(min=1e-8).sqrt()
        self.trained.fold_statistics(mean.float(), std.float())
        self.ema = Ema(self.trained, self.params.ema)

    def states(self) -> dict[str, dict[str, Tensor]]:
        """What the checkpoints of this stage hold: averaged state dicts by network."""
        return {"autoencoder": self.ema.average}

    def state_dict(self) -> dict:
        state = {"ema": self.ema.state_dict(), "optimiser": self.optimiser.state_dict()}
        if self.discriminator:
            state["discriminator"] = self.discriminator.state_dict()
            state["critic_optimiser"] = self.critic_optimiser.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.discriminator:
            self.discriminator.load_state_dict(state["discriminator"])
            self.critic_optimiser.load_state_dict(state["critic_optimiser"])
