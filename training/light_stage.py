"""Stage `light`: the light decoder, distilled from the D of a release."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datapipe.draws import DrawParams
from datapipe.pictures import Batch
from models.codec import Codec
from models.light import fit_linear
from models.losses import distortion
from models.records import Draws
from models.released import states_of
from training.coded_stage import CodedStage
from training.config import LightStageParams, TrainConfig


class Distilled(NamedTuple):
    """A forward pass: the light decoder's picture and D's of the same latent, N x 3 x H x W (None without a term of it);
    rate of the residual, (N,)."""

    image: Tensor
    teacher: Tensor | None
    residual_bpp: Tensor


class LightStage(CodedStage):
    """Stage `light`: L = w_t |D(x^) - X^|^2 + w_d |Y - X^|^2 + w_c |chroma|^2 + w_p perceptual (+ adversary), X^ = L(x^).

    Y is the original X, or D(x^). x^ is the codec's own, at rates that are drawn, or E(X) itself. The light decoder L alone
    learns.
    """

    name = "light"
    params: LightStageParams

    def __init__(self, config: TrainConfig, codec: Codec, device: torch.device):
        super().__init__(config, codec, device)
        self.speed.prepare(codec)
        codec.eval().requires_grad_(False)
        self.network = codec.light.train().requires_grad_(True)
        self.trained = nn.ModuleDict({"light": codec.light})
        self.frozen = tuple(states_of(codec))
        self.last_layer = codec.light.conv_out.weight
        self.factors = self.shared_factors()
        if self.params.teacher_weight:
            self.factors["teacher"] = self.params.teacher_weight

    def draw_params(self, height: int, width: int) -> DrawParams:
        return self.coded_draws(height, width, last_step_share=1.0, decoder_input=True)

    def forward(self, model: nn.Module, batch: Batch) -> Distilled:
        return self.distilled(model, *self.latent(batch))

    def kind(self, batch: Batch) -> None:
        """None: which latents are clean follows from their positions."""
        return None

    @torch.no_grad()
    def latent(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the decoder is given: x^, or E(X) at evenly spread positions of the stream; and rates of the residual."""
        out = self.codec(batch.image, self.as_decoded(Draws(**batch.draws)), decode=False)
        place = batch.position.to(self.device).double() * self.params.clean_share
        clean = (place + self.params.clean_share).floor() > place.floor()
        return torch.where(clean.view(-1, 1, 1, 1), out.x, out.x_hat), out.residual_bpp

    def distilled(self, model: nn.Module, latent: Tensor, residual_bpp: Tensor) -> Distilled:
        with torch.no_grad():
            taught = self.params.teacher_weight or self.params.target == "teacher"
            teacher = self.codec.autoencoder.decode(latent) if taught else None
        return Distilled(model(latent), teacher, residual_bpp)

    def decoded(self, image: Tensor, draws: Draws) -> Distilled:
        out = self.codec(image, draws, decode=False)
        return self.distilled(self.network, out.x_hat, out.residual_bpp)

    def terms(self, out: Distilled, batch: Batch) -> dict[str, Tensor]:
        target = out.teacher if self.params.target == "teacher" else batch.image
        terms = {"distortion": distortion(out.image, target)} | self.shared_terms(out.image, target)
        return terms | {"teacher": distortion(out.image, out.teacher)} if self.params.teacher_weight else terms

    @property
    def begins(self) -> bool:
        return self.params.start is None

    def begin(self, batches: Iterable[Batch]) -> str:
        """Fit the linear map to latents of training pictures and the pictures."""
        moved = (batch.to(self.device) for batch in batches)
        left = fit_linear(self.network, ((self.latent(batch)[0], batch.image) for batch in moved))
        return f"linear map of the light decoder: leaves {left:.1%} of the variance of 16x16 blocks"
