"""Stage `codec`: VQ base, residual codec and UNet together."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datapipe.draws import COPIES, REVIVAL, DrawParams, generator
from datapipe.pictures import Batch
from models.autoencoder import DECODING, ENCODING
from models.codec import Codec
from models.losses import commitment, distortion
from models.records import CodecOutput, Draws
from models.vq_base import perplexity
from training.coded_stage import CodedStage
from training.config import TrainConfig
from training.perceptual_networks import EnergyScore
from training.stage_config import CodecStageParams
from utils import distributed
from utils.ema import Ema


@dataclass(frozen=True)
class Seen:
    """Results of a micro-batch, without gradient.

    Attributes:
        z: N x d_q x h x w. counts, sums: of the code book, (K,) and (K, d_q). image: N x 3 x H x W.
        None without a term of the picture. level, bpp: of the residual, (N,); level is None without a residual codec.
    """

    z: Tensor
    counts: Tensor
    sums: Tensor
    image: Tensor | None
    level: Tensor | None
    bpp: Tensor


@dataclass(frozen=True)
class Usage:
    """Use of the code book in the whole batch of all ranks: counts (K,), sums (K, d_q); z: this rank's, in the order of
    its samples. dead: bool (), a code is unused."""

    counts: Tensor
    sums: Tensor
    z: Tensor
    dead: Tensor


class CodecStage(CodedStage):
    """Stage `codec`: L = w_d |X - X^|^2 + w_p LPIPS(X, X^) + beta |sg(z_q) - VQ-E(x)|^2 + lambda_g R (DiffO, Eq. 10).

    Averages of the assigned vectors replace Eq. 10's code-book term; R is the residual's rate in bits per pixel.
    """

    name = "codec"
    params: CodecStageParams

    def __init__(self, config: TrainConfig, codec: Codec, device: torch.device):
        super().__init__(config, codec, device)
        p = self.params
        self.speed.prepare(codec)
        codec.train()
        codec.zero_grad(set_to_none=True)  # stage gt's gradients
        codec.autoencoder.eval().requires_grad_(False)
        self.network, self.last_layer = codec, codec.unet.last_layer
        self.trained = nn.ModuleDict({"vq_base": codec.vq_base, "unet": codec.unet})
        if p.train_decoder:
            self.last_layer = codec.autoencoder.decoder.last_layer
        halves = {ENCODING: p.train_encoder, DECODING: p.train_decoder}
        self.shares = {tuple(f"autoencoder.{part}." for part in half): share for half, share in halves.items() if share}
        for name, parameter in codec.named_parameters():
            if name.startswith(tuple(start for half in self.shares for start in half)):
                parameter.requires_grad_(True)
        if self.shares:
            self.trained["autoencoder"] = codec.autoencoder
        else:
            self.frozen = ("autoencoder",)
        self.factors = (self.shared_factors() if p.decodes else {}) | {"commitment": p.commitment}
        if p.latent_weight:
            self.factors["latent"] = p.latent_weight
        self.energy = EnergyScore() if p.energy_weight else None
        if self.energy:
            self.speed.prepare(self.energy)
            self.factors["energy"] = p.energy_weight
        if codec.residual:
            self.trained["residual"] = codec.residual
            self.factors["rate"] = 1.0  # lambda_g is inside, one for each sample
        self.fresh_book = config.vq_base is None and config.release is None  # otherwise there are codes worth keeping

    def forward(self, model: nn.Module, batch: Batch) -> CodecOutput:
        draws = Draws(**batch.draws, shift=self.params.shift)
        return model(batch.image, draws, self.params.decodes, self.energy is not None, self.kind(batch))

    def kind(self, batch: Batch) -> tuple[int, int]:
        """Rows and columns of mirror images: all crops of a micro-batch share them, drawn at the position of the first."""
        choices = self.params.copies
        if len(set(choices)) == 1:
            return choices[0], choices[0]
        rows, columns = generator(self.seed, COPIES, int(batch.position[0])).choice(choices, 2).tolist()
        return rows, columns

    def terms(self, out: CodecOutput, batch: Batch) -> dict[str, Tensor]:
        terms = {"commitment": commitment(out.base.z, out.base.z_q)}
        if self.params.decodes:
            terms |= {"distortion": distortion(out.image, batch.image)} | self.shared_terms(out.image, batch.image)
        if self.energy:  # of one picture, as in validation, it is the distance
            terms["energy"] = self.energy(out.image, out.image if out.other is None else out.other, batch.image)
        if self.params.latent_weight:
            terms["latent"] = distortion(out.x_hat, out.x)
        if out.auxiliary is not None:
            terms["rate"] = (self.rate_factor(batch.draws["level"]) * out.residual_bpp).mean()  # lambda_g R
            terms["auxiliary"] = out.auxiliary
        return terms

    def rate_factor(self, level: Tensor) -> Tensor:
        """lambda_g of levels (N,), geometric from the first level's to the last's."""
        first, last = self.params.rate_weights
        share = (level.clamp(min=1) - 1) / (self.codec.params.residual.levels - 1)
        return first * (last / first) ** share

    def decoded(self, image: Tensor, draws: Draws) -> CodecOutput:
        return self.codec(image, draws)

    def draw_params(self, height: int, width: int) -> DrawParams:
        return self.coded_draws(height, width, self.params.last_step_share, self.params.forward == "decoder")

    @torch.no_grad()
    def remark(self, batch: Batch) -> str | None:
        deviation = self.codec.to_latent(batch.image).std().item()
        if 0.7 < deviation < 1.4:
            return None
        return (
            f"the latent's standard deviation is {deviation:.2f}, and the noise schedule is made for about 1. Stage gt "
            "rescales it in its last checkpoint alone; public weights are used as they are"
        )

    # Code book and averages -----------------------------------------------------------------------------------------

    def kept(self, out: CodecOutput, batch: Batch) -> Seen:
        base, level = out.base, batch.draws.get("level")
        image = None if out.image is None else out.image.detach()
        return Seen(base.z.detach(), base.counts, base.sums, image, level, out.residual_bpp.detach())

    def gathered(self, seen: list[Seen], step: int) -> Usage:
        book = self.codec.vq_base.quantize
        own = torch.stack([torch.cat([s.sums, s.counts[:, None]], dim=1) for s in seen]).sum(0)
        together = distributed.all_reduce_sum(own)
        dead = (book.embedding.cluster_size < book.revive_below).any()
        if self.fresh_book and step == 0:  # which gives every code its first place
            dead = torch.ones_like(dead)
        return Usage(together[:, -1], together[:, :-1], torch.cat([s.z for s in seen]), dead)

    def follow(self, usage: Usage, dead: bool, step: int, averages: Ema) -> dict[str, Tensor | float]:
        """Move the code book by averages; unused codes start anew at vectors of the batch, alike on every rank."""
        book, everything, revived = self.codec.vq_base.quantize, self.fresh_book and step == 0, []
        if not everything:
            book.update(usage.counts, usage.sums)
        if dead:
            vectors = distributed.gather_samples(usage.z).permute(0, 2, 3, 1).flatten(0, 2)
            order = generator(self.seed, REVIVAL, step).permutation(len(vectors))
            revived = book.revive(vectors[torch.from_numpy(order).to(vectors.device)], everything)
            # A code that jumped must not drag its old place along in the average, which is what is released.
            for name in ("weight", "cluster_size", "embed_avg"):
                average = averages.average[f"vq_base.quantize.embedding.{name}"]
                average[revived] = getattr(book.embedding, name)[revived]
        return {"perplexity": perplexity(usage.counts), "revived": float(len(revived))}

    def logs(self, seen: list[Seen]) -> dict[str, float]:
        """Mean rate of all ranks' samples at every whole level."""
        if seen[0].level is None:
            return {}
        rates = torch.cat([torch.stack([s.level.round(), s.bpp.double()], dim=1) for s in seen])
        by_level: dict[float, list[float]] = {}
        for level, bpp in sorted(distributed.gather_samples(rates).tolist()):
            by_level.setdefault(level, []).append(bpp)
        nominal = self.codec.nominal_bpp
        return {f"bpp_level_{level:.0f}": nominal + sum(bpp) / len(bpp) for level, bpp in by_level.items()}
