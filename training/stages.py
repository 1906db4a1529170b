"""The two training stages. Each step reads as the equations: draw, forward, losses, backward, averages.

A stage knows its networks, optimisers and losses. It knows nothing of files, folders or the command line; the trainer
(main_diffusion_train_vq.py) feeds it batches and saves what it asks to have saved.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from datapipe.pictures import DRAWS, REVIVAL, generator
from models.codec import Codec
from models.losses import (
    PatchDiscriminator,
    adaptive_weight,
    chroma_distortion,
    commitment,
    distortion,
    hinge_discriminator,
    hinge_generator,
)
from models.records import CELL, Draws
from models.vq_base import perplexity
from training.config import CodecStageParams, GtParams, OptimParams, TrainConfig
from training.perceptual import perceptual_term
from utils import distributed
from utils.ema import Ema
from utils.errors import DiffoError


class NotFinite(DiffoError):
    """A loss that is NaN or infinite; nothing was updated with it."""


def parallel(network: nn.Module) -> nn.Module:
    """DDP over a network whose trainable parameters all take part in every step; itself when unlaunched."""
    if distributed.world_size() == 1:
        return network
    return DistributedDataParallel(network, forward_sync_buffers=False)


class Optimiser:
    """AdamW with its learning-rate schedule, a function of the step alone.

    Quantiles (CompressAI's auxiliary loss) are a group of their own: constant learning rate, no decay, no clipping,
    and they stay out of the gradient's norm.
    """

    QUANTILE_LR = 1e-3

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], params: OptimParams, iterations: int):
        named = [(name, p) for name, p in parameters if p.requires_grad]
        self.parameters = [p for name, p in named if not name.endswith(".quantiles")]
        quantiles = [p for name, p in named if name.endswith(".quantiles")]
        self.params, self.iterations = params, iterations
        self.adamw = torch.optim.AdamW(self.parameters, params.lr, params.betas, weight_decay=params.weight_decay)
        if quantiles:
            self.adamw.add_param_group({"params": quantiles, "lr": self.QUANTILE_LR, "weight_decay": 0.0})

    def lr(self, step: int) -> float:
        p = self.params
        if step < p.warmup:
            return p.lr * (step + 1) / p.warmup
        progress = (step - p.warmup) / max(1, self.iterations - p.warmup)
        end = p.lr if p.lr_end is None else p.lr_end
        return end + (p.lr - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def step(self, loss: Tensor, step: int) -> float:
        """Backward, clip, update; returns the gradient's norm before clipping.

        Raises:
            NotFinite: the gradient is not; it is the same on all ranks, and nothing was updated with it.
        """
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.params.clip or math.inf)
        if not norm.isfinite():
            raise NotFinite(f"step {step}: the gradient is not finite; nothing was updated with it")
        self.adamw.param_groups[0]["lr"] = self.lr(step)
        self.adamw.step()
        return norm.item()


def finite(terms: dict[str, Tensor], stage: str, step: int) -> None:
    """Raise NotFinite naming the first term that is not a number, on every rank alike."""
    values = torch.stack([term.detach().float() for term in terms.values()])
    bad = distributed.all_reduce_sum((~values.isfinite()).float())
    for name, count in zip(terms, bad.tolist(), strict=True):
        if count:
            raise NotFinite(f"stage {stage}, step {step}: the term {name} is not finite; nothing was updated with it")


class GtStage:
    """Stage `gt`: L = w_d |X - X^| + w_p perceptual + w_a lambda hinge (VQGAN, Esser et al. 2021), continuous latent."""

    name = "gt"

    def __init__(self, config: TrainConfig, codec: Codec, device: torch.device):
        p: GtParams = config.gt
        self.params, self.seed, self.device, self.codec = p, config.seed, device, codec
        self.network = codec.autoencoder
        self.network.train().requires_grad_(True)
        if hasattr(self.network, "quantize"):
            self.network.quantize.requires_grad_(False)
        self.distortion = F.l1_loss if p.distortion == "l1" else distortion
        self.perceptual = perceptual_term(p.perceptual)
        self.ema = Ema(self.network, p.ema)
        self.optimiser = Optimiser(self.network.named_parameters(), p.optim, p.iterations)
        self.model = parallel(self.network)
        self.discriminator = (
            PatchDiscriminator().to(device, self.network.decoder.last_layer.dtype) if p.adversarial_weight else None
        )
        if self.discriminator:
            self.critic = parallel(self.discriminator)
            self.critic_optimiser = Optimiser(self.discriminator.named_parameters(), p.optim, p.iterations)

    def step(self, image: Tensor, positions: Tensor, step: int) -> tuple[dict[str, float], list[Tensor]]:
        """One update; returns the scalars to log and the rows of pictures to show."""
        p = self.params
        adversarial = self.discriminator is not None and step >= p.adversarial_start
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
            scores = self.critic(torch.cat([image, restored.detach()]))
            terms["discriminator"] = hinge_discriminator(*scores.chunk(2))
            finite(terms, self.name, step)
            self.critic_optimiser.step(terms["discriminator"], step)
        self.ema.update(self.network)
        return logs | {name: term.item() for name, term in terms.items()}, [image, restored.detach()]

    def _judged(self, image: Tensor) -> Tensor:
        """The discriminator's logits with its weights held constant: gradients reach the image alone."""
        weights = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
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


class CodecStage:
    """Stage `codec`: L = w_d |X - X^|^2 + w_p LPIPS(X, X^) + beta |sg(z_q) - VQ-E(x)|^2 + lambda_g R (DiffO, Eq. 10).

    Averages of the assigned vectors replace Eq. 10's code-book term; R is the residual's rate in bits per pixel.
    """

    name = "codec"

    def __init__(self, config: TrainConfig, codec: Codec, device: torch.device):
        p: CodecStageParams = config.codec
        self.params, self.seed, self.device, self.codec = p, config.seed, device, codec
        codec.train()
        codec.autoencoder.eval().requires_grad_(False)
        self.trained = nn.ModuleDict({"vq_base": codec.vq_base, "unet": codec.unet})
        if codec.residual:
            self.trained["residual"] = codec.residual
        self.perceptual = perceptual_term(p.perceptual)
        self.ema = Ema(self.trained, p.ema)
        self.optimiser = Optimiser(codec.named_parameters(), p.optim, p.iterations)
        self.model = parallel(codec)

    def step(self, image: Tensor, positions: Tensor, step: int) -> tuple[dict[str, float], list[Tensor]]:
        """One update; returns the scalars to log and the rows of pictures to show."""
        p = self.params
        draws = self.draws(positions, image.shape[2:])
        out = self.model(image, draws)
        terms = {
            "distortion": distortion(out.image, image),
            "perceptual": self.perceptual(out.image, image),
            "commitment": commitment(out.base.z, out.base.z_q),
        }
        loss = (
            p.distortion_weight * terms["distortion"]
            + p.perceptual_weight * terms["perceptual"]
            + p.commitment * terms["commitment"]
        )
        if p.chroma_weight:
            terms["chroma"] = chroma_distortion(out.image, image)
            loss = loss + p.chroma_weight * terms["chroma"]
        if out.auxiliary is not None:
            terms["rate"] = (self.rate_weight(draws.level) * out.residual_bpp).mean()  # lambda_g R
            terms["auxiliary"] = out.auxiliary
            loss = loss + terms["rate"] + terms["auxiliary"]
        finite(terms, self.name, step)
        logs = {"loss": loss.item(), "grad_norm": self.optimiser.step(loss, step), "lr": self.optimiser.lr(step)}
        logs |= self._move_codebook(out.base, step)
        if draws.level is not None:
            logs |= self._rates(draws.level, out.residual_bpp)
        self.ema.update(self.trained)
        return logs | {name: term.item() for name, term in terms.items()}, [image, out.image.detach()]

    def draws(self, positions: Tensor, size: tuple[int, int]) -> Draws:
        """t, eta and noise of every sample, from its position in the stream alone."""
        params, latent = self.codec.params, [side // CELL for side in size]
        shape = (params.autoencoder.embed_dim, *latent)
        last = params.diffusion.steps - 1
        residual = self.codec.residual
        t, spread, noise, level, uniform = [], [], [], [], []
        for position in positions.tolist():
            random = generator(self.seed, DRAWS, position)
            share = self.params.last_step_share
            if share is None:
                t.append(int(random.integers(0, last + 1)))
            else:
                t.append(last if last == 0 or random.random() < share else int(random.integers(0, last)))
            factor = 2 ** random.uniform(-1, 1)  # log-uniform within a factor 2
            spread.append(factor if self.params.forward == "decoder" else math.nan)
            noise.append(torch.from_numpy(random.standard_normal(shape, dtype=np.float32)))
            if residual:
                sent = random.random() >= self.params.base_only_share
                level.append(random.uniform(1, residual.params.levels) if sent else 0.0)
                numbers = random.random(residual.noise_size(*latent), dtype=np.float32) - 0.5
                uniform.append(torch.from_numpy(numbers))
        return Draws(
            torch.tensor(t, device=self.device),
            torch.tensor(spread, device=self.device, dtype=torch.float64),
            torch.stack(noise).to(self.device),
            torch.tensor(level, device=self.device, dtype=torch.float64) if residual else None,
            torch.stack(uniform).to(self.device) if uniform else None,
            self.params.shift,
        )

    def rate_weight(self, level: Tensor) -> Tensor:
        """lambda_g of levels (N,), geometric from the first level's to the last's."""
        first, last = self.params.rate_weights
        share = (level.clamp(min=1) - 1) / (self.codec.params.residual.levels - 1)
        return first * (last / first) ** share

    def _rates(self, level: Tensor, residual_bpp: Tensor) -> dict[str, float]:
        """Mean rate of this rank's samples at every whole level, for the log."""
        nearest = level.round()
        return {
            f"bpp_level_{int(g)}": self.codec.nominal_bpp + residual_bpp[nearest == g].detach().mean().item()
            for g in nearest.unique().tolist()
        }

    def _move_codebook(self, base, step: int) -> dict[str, float]:
        """Averages over all ranks, then unused codes start anew at vectors of this batch, alike on every rank."""
        book = self.codec.vq_base.quantize
        counts, sums = distributed.all_reduce_sum(base.counts), distributed.all_reduce_sum(base.sums)
        vectors = distributed.gather_samples(base.z.detach()).permute(0, 2, 3, 1).flatten(0, 2)
        order = generator(self.seed, REVIVAL, step).permutation(len(vectors))
        vectors = vectors[torch.from_numpy(order).to(vectors.device)]
        if step > 0:
            book.update(counts, sums)
        revived = book.revive(vectors, everything=step == 0)
        # A code that jumped must not drag its old place along in the average, which is what is released.
        for name in ("weight", "cluster_size", "embed_avg"):
            self.ema.average[f"vq_base.quantize.embedding.{name}"][revived] = getattr(book.embedding, name)[revived]
        return {"perplexity": perplexity(counts).item(), "revived": float(len(revived))}

    def finish(self, batches) -> None:
        """Nothing is left to do: the averaged weights are the result."""

    def states(self) -> dict[str, dict[str, Tensor]]:
        """What the checkpoints of this stage hold: averaged state dicts by network."""
        average = {"autoencoder": self.codec.autoencoder.state_dict()}
        for key, value in self.ema.average.items():
            network, name = key.split(".", 1)
            average.setdefault(network, {})[name] = value
        return average

    def state_dict(self) -> dict:
        return {"ema": self.ema.state_dict(), "optimiser": self.optimiser.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.ema.load_state_dict(state["ema"])
        self.optimiser.adamw.load_state_dict(state["optimiser"])


STAGES = {stage.name: stage for stage in (GtStage, CodecStage)}
