"""Stage `texture`: the texture network of a release learns, its D too if asked, and the bytes of its files stay."""

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder
from models.blocks import finished
from models.codec import Codec
from models.records import Draws
from models.released import states_of
from models.texture import Texture
from training.decoder_stage import DecoderStage, Shown
from training.stage_config import TextureStageParams


class TexturedDecoder(nn.Module):
    """D and the texture network as one: N x d x h x w and white noise, N x 256 x h x w -> N x 3 x 16h x 16w.

    Args:
        both: D learns, too.
    """

    def __init__(self, autoencoder: Autoencoder, texture: Texture, both: bool):
        super().__init__()
        self.autoencoder, self.texture, self.both = autoencoder, texture, both

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.both and torch.is_grad_enabled()):
            image = self.autoencoder.decode(x)
        return self.texture(image, x, noise.to(image))


class TextureStage(DecoderStage):
    """Stage `texture`: L = w_d |X - X~|^2 + w_c |chroma|^2 + w_p perceptual (+ adversary), X~ = finished(T(D(x^), x^, noise)).

    x^ is the codec's own, at rates that are drawn, or E(X) itself. T, the texture network, learns, and D at a share of its
    learning rate.
    """

    name = "texture"
    params: TextureStageParams

    def choose(self, codec: Codec) -> None:
        learn = {"texture": codec.texture}
        freed = [codec.texture]
        if self.params.train_decoder:
            learn["autoencoder"] = codec.autoencoder
            freed += codec.autoencoder.decoding()
            self.shares = {("autoencoder.",): self.params.train_decoder}
        for part in freed:
            part.train().requires_grad_(True)
        self.network = TexturedDecoder(codec.autoencoder, codec.texture, "autoencoder" in learn)
        self.trained = nn.ModuleDict(learn)
        self.frozen = tuple(name for name in states_of(codec) if name not in learn)
        self.last_layer = codec.texture.conv_out.weight

    def shown(self, model: nn.Module, latent: Tensor, residual_bpp: Tensor, draws: Draws) -> Shown:
        rules = self.codec.params
        return Shown(finished(model(latent, draws.grain), rules.sharpening, rules.colour_blur), residual_bpp)
