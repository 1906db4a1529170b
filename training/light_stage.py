"""Stage `light`: the light decoder, distilled from the D of a release."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datapipe.pictures import Batch
from models.codec import Codec
from models.light import fit_linear
from models.losses import distortion
from models.records import Draws
from models.released import states_of
from training.decoder_stage import DecoderStage
from training.stage_config import LightStageParams


class Distilled(NamedTuple):
    """A forward pass: the light decoder's picture and D's of the same latent, N x 3 x H x W (None without a term of it);
    rate of the residual, (N,)."""

    image: Tensor
    teacher: Tensor | None
    residual_bpp: Tensor


class LightStage(DecoderStage):
    """Stage `light`: L = w_t |D(x^) - X^|^2 + w_d |Y - X^|^2 + w_c |chroma|^2 + w_p perceptual (+ adversary), X^ = L(x^).

    Y is the original X, or D(x^). The light decoder L learns in D's place, from the same latents.
    """

    name = "light"
    params: LightStageParams

    def choose(self, codec: Codec) -> None:
        self.network = codec.light.train().requires_grad_(True)
        self.trained = nn.ModuleDict({"light": codec.light})
        self.frozen = tuple(states_of(codec))
        self.last_layer = codec.light.conv_out.weight

    def shared_factors(self) -> dict[str, float]:
        weight = self.params.teacher_weight
        return super().shared_factors() | ({"teacher": weight} if weight else {})

    def shown(self, model: nn.Module, latent: Tensor, residual_bpp: Tensor, draws: Draws) -> Distilled:
        with torch.no_grad():
            taught = self.params.teacher_weight or self.params.target == "teacher"
            teacher = self.codec.autoencoder.decode(latent) if taught else None
        return Distilled(model(latent), teacher, residual_bpp)

    def terms(self, out: Distilled, batch: Batch) -> dict[str, Tensor]:
        terms = self.compared(out.image, out.teacher if self.params.target == "teacher" else batch.image)
        return terms | {"teacher": distortion(out.image, out.teacher)} if self.params.teacher_weight else terms

    @property
    def begins(self) -> bool:
        return self.params.start is None

    def begin(self, batches: Iterable[Batch]) -> str:
        """Fit the linear map to latents of training pictures and the pictures."""
        moved = (batch.to(self.device) for batch in batches)
        left = fit_linear(self.network, ((self.latent(batch)[0], batch.image) for batch in moved))
        return f"linear map of the light decoder: leaves {left:.1%} of the variance of 16x16 blocks"
