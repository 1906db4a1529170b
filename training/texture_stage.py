"""Stage `texture`: the texture network of a release learns, and the bytes of its files stay."""

import torch
from torch import Tensor, nn

from models.blocks import finished
from models.codec import Codec
from models.records import Draws
from models.released import states_of
from training.decoder_stage import DecoderStage, Shown
from training.stage_config import TextureStageParams


class TextureStage(DecoderStage):
    """Stage `texture`: L = w_d |X - X~|^2 + w_c |chroma|^2 + w_p perceptual (+ adversary), X~ = finished(T(D(x^), x^, noise)).

    x^ is the codec's own, at rates that are drawn, or E(X) itself. T, the texture network, alone learns.
    """

    name = "texture"
    params: TextureStageParams

    def choose(self, codec: Codec) -> None:
        self.network = codec.texture.train().requires_grad_(True)
        self.trained = nn.ModuleDict({"texture": codec.texture})
        self.frozen = tuple(name for name in states_of(codec) if name != "texture")
        self.last_layer = codec.texture.conv_out.weight

    def shown(self, model: nn.Module, latent: Tensor, residual_bpp: Tensor, draws: Draws) -> Shown:
        with torch.no_grad():
            image = self.codec.autoencoder.decode(latent)
        rules = self.codec.params
        return Shown(
            finished(model(image, latent, draws.grain.to(image)), rules.sharpening, rules.colour_blur), residual_bpp
        )
