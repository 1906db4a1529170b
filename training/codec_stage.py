"""Stage `codec`: VQ base, residual codec and UNet together. The step reads as the equations: draw, forward, losses,
backward, averages. What a stage knows: see training/gt_stage.py.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from datapipe.draws import REVIVAL, DrawParams, draw_batch, generator
from models.codec import Codec
from models.losses import chroma_distortion, commitment, distortion
from models.records import CELL, CodecOutput, Draws
from models.vq_base import perplexity
from training.config import CodecStageParams, TrainConfig
from training.optimiser import Optimiser, accumulate, averaged, blank, micro_batches, parallel, settle, synchronised
from training.perceptual import perceptual_term
from training.speed import Speed
from training.validation import Evaluated
from utils import distributed
from utils.ema import Ema


@dataclass(frozen=True)
class Seen:
    """What a step keeps of a micro-batch after its backward pass, all without gradient.

    Attributes:
        z: N x d_q x h x w. counts, sums: of the code book, (K,) and (K, d_q). image: N x 3 x H x W.
        level, bpp: of the residual, (N,); level is None without a residual codec.
    """

    z: Tensor
    counts: Tensor
    sums: Tensor
    image: Tensor
    level: Tensor | None
    bpp: Tensor

    @classmethod
    def of(cls, out: CodecOutput, draws: Draws) -> "Seen":
        base = out.base
        return cls(base.z.detach(), base.counts, base.sums, out.image.detach(), draws.level, out.residual_bpp.detach())


class CodecStage:
    """Stage `codec`: L = w_d |X - X^|^2 + w_p LPIPS(X, X^) + beta |sg(z_q) - VQ-E(x)|^2 + lambda_g R (DiffO, Eq. 10).

    Averages of the assigned vectors replace Eq. 10's code-book term; R is the residual's rate in bits per pixel.
    """

    name = "codec"
    finishes = False  # it can be trained further after its end

    def __init__(self, config: TrainConfig, codec: Codec, device: torch.device):
        p: CodecStageParams = config.codec
        self.params, self.seed, self.device, self.codec = p, config.seed, device, codec
        self.speed = Speed(config.speed, device)
        self.speed.prepare(codec)
        codec.train()
        codec.zero_grad(set_to_none=True)  # stage gt's gradients
        codec.autoencoder.eval().requires_grad_(False)
        self.trained = nn.ModuleDict({"vq_base": codec.vq_base, "unet": codec.unet})
        if codec.residual:
            self.trained["residual"] = codec.residual
        self.perceptual = perceptual_term(p.perceptual)
        if isinstance(self.perceptual, nn.Module):
            self.speed.prepare(self.perceptual)
        self.ema = Ema(self.trained, p.ema)
        self.optimiser = Optimiser(codec.named_parameters(), p.optim, p.iterations, self.speed.fused_adamw)
        self.model = parallel(codec)
        self.fresh_book = config.vq_base is None  # otherwise there are codes worth keeping
        settle(self.model, lambda: self.rehearse(self.blank()))

    def step(self, image: Tensor, positions: Tensor, step: int) -> tuple[dict[str, float], list[Tensor]]:
        """One update; returns the scalars to log and the rows of pictures to show.

        What is logged as `loss` is Eq. 10 alone: the auxiliary loss, of no picture, would drown it.

        Raises:
            NotFinite: a term or the gradient is not; nothing was updated.
        """
        parts = micro_batches(len(image), self.params.microbatch)
        terms, seen = {}, []
        self.optimiser.zero_grad()
        for part in parts:
            draws = self.draws(positions[part], image.shape[2:])
            with synchronised(self.model, part is parts[-1]):
                with self.speed.autocast():
                    out = self.model(image[part], draws)
                own = self.losses(out, image[part], draws)
                share = len(out.image) / len(image)
                # The auxiliary loss is of no sample: the shares of the micro-batches add up to one of it.
                (share * (own["loss"] + own.get("auxiliary", 0))).backward()
            accumulate(terms, own, share)
            seen.append(Seen.of(out, draws))
        logs = averaged(terms, self.name, step)
        logs |= {"grad_norm": self.optimiser.clip(self.name, step), "lr": self.optimiser.lr(step)}
        self.optimiser.update(step)
        logs |= self._move_codebook(seen, step) | self._rates(seen)
        self.ema.update(self.trained)
        return logs, [image, torch.cat([s.image for s in seen])]

    def losses(self, out: CodecOutput, image: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The terms of Eq. 10, means over the pictures given, and `loss`, their weighted sum without the auxiliary one."""
        p = self.params
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
            loss = loss + terms["rate"]
        return terms | {"loss": loss}

    def draws(self, positions: Tensor, size: tuple[int, int]) -> Draws:
        """t, eta and noise of every sample, from its position in the stream alone."""
        params, (h, w) = self.codec.params, (side // CELL for side in size)
        residual = self.codec.residual
        drawn = DrawParams(
            (params.autoencoder.embed_dim, h, w),
            params.diffusion.steps,
            self.params.last_step_share,
            self.params.forward == "decoder",
            self.params.base_only_share,
            residual.params.levels if residual else 0,
            residual.noise_size(h, w) if residual else 0,
        )
        numbers = draw_batch(drawn, self.seed, positions.tolist())
        return Draws(**{k: v.to(self.device) for k, v in numbers.items()}, shift=self.params.shift)

    def rate_weight(self, level: Tensor) -> Tensor:
        """lambda_g of levels (N,), geometric from the first level's to the last's."""
        first, last = self.params.rate_weights
        share = (level.clamp(min=1) - 1) / (self.codec.params.residual.levels - 1)
        return first * (last / first) ** share

    def _rates(self, seen: list[Seen]) -> dict[str, float]:
        """Mean rate of all ranks' samples at every whole level, for the log."""
        if seen[0].level is None:
            return {}
        rates = torch.cat([torch.stack([s.level.round(), s.bpp.double()], dim=1) for s in seen])
        by_level: dict[float, list[float]] = {}
        for level, bpp in sorted(distributed.gather_samples(rates).tolist()):
            by_level.setdefault(level, []).append(bpp)
        nominal = self.codec.nominal_bpp
        return {f"bpp_level_{level:.0f}": nominal + sum(bpp) / len(bpp) for level, bpp in by_level.items()}

    def _move_codebook(self, seen: list[Seen], step: int) -> dict[str, float]:
        """Averages over the whole batch of all ranks, then unused codes start anew at its vectors, alike on every rank."""
        book = self.codec.vq_base.quantize
        counts = distributed.all_reduce_sum(torch.stack([s.counts for s in seen]).sum(0))
        sums = distributed.all_reduce_sum(torch.stack([s.sums for s in seen]).sum(0))
        vectors = distributed.gather_samples(torch.cat([s.z for s in seen])).permute(0, 2, 3, 1).flatten(0, 2)
        order = generator(self.seed, REVIVAL, step).permutation(len(vectors))
        vectors = vectors[torch.from_numpy(order).to(vectors.device)]
        everything = self.fresh_book and step == 0
        if not everything:
            book.update(counts, sums)
        revived = book.revive(vectors, everything)
        # A code that jumped must not drag its old place along in the average, which is what is released.
        for name in ("weight", "cluster_size", "embed_avg"):
            self.ema.average[f"vq_base.quantize.embedding.{name}"][revived] = getattr(book.embedding, name)[revived]
        return {"perplexity": perplexity(counts).item(), "revived": float(len(revived))}

    @torch.no_grad()
    def evaluate(self, image: Tensor, position: int) -> Evaluated:
        """One picture of validation, 1 x 3 x H x W, sides multiples of 16, with the weights as they are.

        It is decoded as a file is, in one step from y^ and noise that belongs to the position, from the base alone and
        at the highest level. Rates are the model's: the base at fixed length, the residual by its densities.
        """
        levels = [0.0] if self.codec.residual is None else [0.0, float(self.codec.residual.params.levels)]
        image = image.expand(len(levels), -1, -1, -1)
        draws = self.draws(torch.full((len(levels),), position), image.shape[2:])
        draws = replace(
            draws,
            t=torch.full_like(draws.t, self.codec.params.diffusion.steps - 1),
            spread=torch.ones_like(draws.spread),
            decoder_input=torch.full_like(draws.decoder_input, self.params.forward == "decoder"),
            level=None if draws.level is None else draws.level.new_tensor(levels),
        )
        out = self.codec(image, draws)
        bpp = (self.codec.nominal_bpp + out.residual_bpp.double()).tolist()
        shown = {f"_level_{g:.0f}": (out.image[i : i + 1], bpp[i]) for i, g in enumerate(levels)}
        return Evaluated(self.losses(out, image, draws)["loss"].item(), shown)

    def rehearse(self, image: Tensor) -> Tensor:
        """The loss of a micro-batch, for what its backward pass would need."""
        draws = self.draws(torch.arange(len(image), device="cpu"), image.shape[2:])
        with self.speed.autocast():
            out = self.model(image, draws)
        terms = self.losses(out, image, draws)
        return terms["loss"] + terms.get("auxiliary", 0)

    def blank(self) -> Tensor:
        """Pictures to rehearse with."""
        return blank(self.params, self.codec.autoencoder.decoder.last_layer)

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
        return {"ema": self.ema.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
