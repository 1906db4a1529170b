"""Stage `codec`: VQ base, residual codec and UNet together. The step reads as the equations: draw, forward, losses,
backward, averages. What a stage knows: see training/gt_stage.py.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from datapipe.pictures import DRAWS, REVIVAL, generator
from models.codec import Codec
from models.losses import chroma_distortion, commitment, distortion
from models.records import CELL, Draws
from models.vq_base import perplexity
from training.config import CodecStageParams, TrainConfig
from training.optimiser import Optimiser, finite, parallel
from training.perceptual import perceptual_term
from training.speed import Speed
from utils import distributed
from utils.ema import Ema


class CodecStage:
    """Stage `codec`: L = w_d |X - X^|^2 + w_p LPIPS(X, X^) + beta |sg(z_q) - VQ-E(x)|^2 + lambda_g R (DiffO, Eq. 10).

    Averages of the assigned vectors replace Eq. 10's code-book term; R is the residual's rate in bits per pixel.
    """

    name = "codec"

    def __init__(self, config: TrainConfig, codec: Codec, device: torch.device):
        p: CodecStageParams = config.codec
        self.params, self.seed, self.device, self.codec = p, config.seed, device, codec
        self.speed = Speed(config.speed, device)
        self.speed.prepare(codec)
        codec.train()
        codec.autoencoder.eval().requires_grad_(False)
        self.trained = nn.ModuleDict({"vq_base": codec.vq_base, "unet": codec.unet})
        if codec.residual:
            self.trained["residual"] = codec.residual
        self.perceptual = perceptual_term(p.perceptual)
        self.ema = Ema(self.trained, p.ema)
        self.optimiser = Optimiser(codec.named_parameters(), p.optim, p.iterations, self.speed.fused_adamw)
        self.model = parallel(codec)

    def step(self, image: Tensor, positions: Tensor, step: int) -> tuple[dict[str, float], list[Tensor]]:
        """One update; returns the scalars to log and the rows of pictures to show."""
        p = self.params
        draws = self.draws(positions, image.shape[2:])
        with self.speed.autocast():
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
