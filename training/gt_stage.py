"""Stage `gt`: the image autoencoder."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datapipe.draws import DrawParams
from datapipe.pictures import Batch
from models.autoencoder import fit_linear
from models.bitstream import CELL
from models.codec import Codec
from models.losses import distortion
from training.config import TrainConfig
from training.stage import Evaluated, Restored, Stage
from training.stage_config import GtParams
from utils import distributed


class GtStage(Stage):
    """Stage `gt`: L = w_d |X - X^| + w_c |chroma|^2 + w_p perceptual (+ adversary), X^ = D(E(X)), continuous latent.

    VQGAN's (Esser et al. 2021) but for the quantiser, which the codec never uses.
    """

    name = "gt"
    finishes = True
    params: GtParams

    def __init__(self, config: TrainConfig, codec: Codec, device: torch.device):
        super().__init__(config, codec, device)
        p = self.params
        self.network = codec.autoencoder
        self.trained = nn.ModuleDict({"autoencoder": codec.autoencoder})
        self.last_layer = codec.autoencoder.decoder.last_layer
        self.speed.prepare(self.network)
        self.network.train().requires_grad_(True)
        # Channels that the linear shortcut has already; those that a wider latent has gained are zero.
        self.fitted = 0
        if self.network.shortcut and (config.autoencoder or config.release):
            self.fitted = int(self.network.shortcut.analysis.weight.flatten(1).any(1).sum())
        if hasattr(self.network, "quantize"):
            self.network.quantize.requires_grad_(False)
        self.distortion = F.l1_loss if p.distortion == "l1" else distortion
        self.factors = self.shared_factors()

    def forward(self, model: nn.Module, batch: Batch) -> Restored:
        """X^ = D(E(X)), or D(E(X) + noise) with `latent_noise`."""
        if not self.params.latent_noise:
            return Restored(model(batch.image))
        noise = self.params.latent_noise * batch.draws["noise"]
        return Restored(model(batch.image, noise, self.params.latent_scale != "channel"))

    def draw_params(self, height: int, width: int) -> DrawParams | None:
        d = self.codec.params.autoencoder.embed_dim
        return DrawParams((d, height // CELL, width // CELL), steps=1) if self.params.latent_noise else None

    def terms(self, out: Restored, batch: Batch) -> dict[str, Tensor]:
        distortion = {"distortion": self.distortion(out.image, batch.image)}
        return distortion | self.shared_terms(out.image, batch.image)

    @torch.no_grad()
    def evaluate(self, image: Tensor, position: int) -> Evaluated:
        batch, out = Batch(image, torch.tensor([position])), Restored(self.network(image))
        return Evaluated(self.losses(out, batch)["loss"].item(), {"": (out.image, None)})

    @property
    def begins(self) -> bool:
        shortcut = self.network.shortcut
        return shortcut is not None and self.fitted < shortcut.analysis.out_channels

    def begin(self, batches: Iterable[Batch]) -> str:
        """Fit the linear shortcut, or the part of it that a wider latent has gained, to training pictures."""
        variances = fit_linear(self.network, (batch.image for batch in batches), self.fitted)
        new = self.network.params.embed_dim - self.fitted
        share, of = variances[:new].sum() / variances.sum(), "what they left" if self.fitted else "the variance"
        beside = f" beside the {self.fitted} that were there" if self.fitted else ""
        return f"linear shortcut: {share:.1%} of {of} in {new} channels{beside}"

    @torch.no_grad()
    def finish(self, batches: Iterable[Batch]) -> None:
        """Rescale the latent to mean 0 and deviation 1, as `scale_input` assumes: of every channel, or of all together."""
        self.network.eval()
        if self.params.latent_scale == "kept":
            return
        moments, seen = 0, 0
        for batch in batches:
            x = self.network.encode(batch.image.to(self.device)).double()
            moments = moments + torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
            seen += x.numel() // x.shape[1]
        mean, square = distributed.all_reduce_sum(moments) / (seen * distributed.world_size())
        variance = (square - mean.square()).clamp(min=1e-8)
        if self.params.latent_scale == "common":
            variance = variance.mean().expand_as(variance)
        self.network.fold_statistics(mean.float(), variance.sqrt().float())
