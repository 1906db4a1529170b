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
from training.config import GtParams, TrainConfig
from training.stage import Evaluated, Restored, Stage
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
        self.given = bool(config.autoencoder or config.release)
        if hasattr(self.network, "quantize"):
            self.network.quantize.requires_grad_(False)
        self.distortion = F.l1_loss if p.distortion == "l1" else distortion
        self.factors = self.shared_factors()

    def forward(self, model: nn.Module, batch: Batch) -> Restored:
        """X^ = D(E(X)), or D(E(X) + noise) with `latent_noise`."""
        if not self.params.latent_noise:
            return Restored(model(batch.image))
        noise = self.params.latent_noise * batch.draws["noise"]
        return Restored(model(batch.image, noise, self.params.latent_scale == "common"))

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
        return self.codec.params.autoencoder.shortcut == "linear" and not self.given

    def begin(self, batches: Iterable[Batch]) -> str:
        """Fit the linear shortcut to training pictures."""
        kept = self.network.params.embed_dim
        variances = fit_linear(self.network, (batch.image for batch in batches))
        return f"linear shortcut: {variances[:kept].sum() / variances.sum():.1%} of the variance in {kept} channels"

    @torch.no_grad()
    def finish(self, batches: Iterable[Batch]) -> None:
        """Rescale the latent to mean 0 and deviation 1, as `scale_input` assumes: of every channel, or of all together."""
        self.network.eval()
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
