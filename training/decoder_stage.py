"""Stage `decoder`: D of a release goes on learning, and the bytes of its files stay."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datapipe.draws import DrawParams
from datapipe.pictures import Batch
from models.autoencoder import Autoencoder
from models.codec import Codec
from models.losses import distortion
from models.records import Draws
from models.released import states_of
from training.coded_stage import CodedStage
from training.config import TrainConfig
from training.stage_config import DecoderStageParams


class Shown(NamedTuple):
    """A forward pass: image, N x 3 x H x W, and rate of the residual, (N,)."""

    image: Tensor
    residual_bpp: Tensor


class ImageDecoder(nn.Module):
    """D of an image autoencoder as a network of its own: N x d x h x w -> N x 3 x 16h x 16w."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor) -> Tensor:
        return self.autoencoder.decode(x)


class DecoderStage(CodedStage):
    """Stage `decoder`: L = w_d |X - X^|^2 + w_c |chroma|^2 + w_p perceptual (+ adversary), X^ = D(x^).

    x^ is the codec's own, at rates that are drawn, or E(X) itself. D alone learns.
    """

    name = "decoder"
    params: DecoderStageParams

    def __init__(self, config: TrainConfig, codec: Codec, device: torch.device):
        super().__init__(config, codec, device)
        self.speed.prepare(codec)
        codec.eval().requires_grad_(False)
        self.choose(codec)
        self.factors = self.shared_factors()

    def choose(self, codec: Codec) -> None:
        """Set the networks of the stage, all of which are frozen: what learns is freed."""
        for part in codec.autoencoder.decoding():
            part.train().requires_grad_(True)
        self.network = ImageDecoder(codec.autoencoder)
        self.trained = nn.ModuleDict({"autoencoder": codec.autoencoder})
        self.frozen = tuple(name for name in states_of(codec) if name != "autoencoder")
        self.last_layer = codec.autoencoder.decoder.last_layer

    def draw_params(self, height: int, width: int) -> DrawParams:
        return self.coded_draws(height, width, last_step_share=1.0, decoder_input=True)

    def kind(self, batch: Batch) -> None:
        """None: which latents are clean follows from their positions."""
        return None

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return self.shown(model, *self.latent(batch), Draws(**batch.draws))

    @torch.no_grad()
    def latent(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the decoder is given: x^, or E(X) at evenly spread positions of the stream; and rates of the residual."""
        out = self.codec(batch.image, self.as_decoded(Draws(**batch.draws)), decode=False)
        place = batch.position.to(self.device).double() * self.params.clean_share
        clean = (place + self.params.clean_share).floor() > place.floor()
        return torch.where(clean.view(-1, 1, 1, 1), out.x, out.x_hat), out.residual_bpp

    def shown(self, model: nn.Module, latent: Tensor, residual_bpp: Tensor, draws: Draws) -> Any:
        """The forward pass from latents, N x d x h x w, and rates on."""
        return Shown(model(latent), residual_bpp)

    def decoded(self, image: Tensor, draws: Draws) -> Any:
        out = self.codec(image, draws, decode=False)
        return self.shown(self.network, out.x_hat, out.residual_bpp, draws)

    def terms(self, out: Any, batch: Batch) -> dict[str, Tensor]:
        return self.compared(out.image, batch.image)

    def compared(self, image: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Terms of pictures and what they should be, N x 3 x H x W."""
        return {"distortion": distortion(image, target)} | self.shared_terms(image, target)
