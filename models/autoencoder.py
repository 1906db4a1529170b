"""Image <-> latent: E and D of the paper (the "GT" VQGAN autoencoder, f = 16), used without quantisation."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.blocks import Decoder, Encoder, nearest_codes, start_linear

COMMITMENT = 0.25  # beta of the VQGAN quantiser loss


@dataclass(frozen=True)
class AutoencoderParams:
    """Size of the image autoencoder. The defaults are the published ones (VQGAN f16-16384)."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    embed_dim: int = 256
    n_embed: int = 16384  # entries of the VQGAN code book, which the codec never uses; 0 leaves it out
    groups: int = 32

    @property
    def downsampling(self) -> int:
        """Pixels per latent position, along each side."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class Quantized:
    """Result of the VQGAN quantiser: `z` as the input, `indices` int64 (N*h*w,), scalar `loss`."""

    z: Tensor
    indices: Tensor
    loss: Tensor


class Autoencoder(nn.Module):
    """E: N x 3 x H x W in [-1, 1] -> N x d x H/16 x W/16, and D back (unclamped). H, W: multiples of 16.

    `quant_conv` and `post_quant_conv` also carry the latent's mean and deviation (`fold_statistics`), so that
    no caller can forget them. Results have the precision of the input, whatever autocast made of it inside.
    """

    def __init__(self, params: AutoencoderParams):
        super().__init__()
        self.params = params
        shared = dict(ch=params.ch, ch_mult=params.ch_mult, num_res_blocks=params.num_res_blocks, groups=params.groups)
        self.encoder = Encoder(3, params.z_channels, **shared)
        self.decoder = Decoder(params.z_channels, 3, **shared)
        if params.n_embed:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(params.n_embed, params.embed_dim)
            self.quantize.embedding.requires_grad_(False)  # no latent of the codec passes through it
        self.quant_conv = nn.Conv2d(params.z_channels, params.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(params.embed_dim, params.z_channels, 1)
        start_linear(self)

    def encode(self, image: Tensor) -> Tensor:  # N 3 H W -> N d h w
        return self.quant_conv(self.encoder(image)).to(image.dtype)

    def decode(self, x: Tensor) -> Tensor:  # N d h w -> N 3 H W
        return self.decoder(self.post_quant_conv(x)).to(x.dtype)

    def forward(self, image: Tensor) -> Tensor:
        return self.decode(self.encode(image))

    def quantise(self, x: Tensor) -> Quantized:
        """VQGAN's own quantiser (van den Oord et al. 2017, Eq. 3), kept for public weights; the codec never calls it."""
        z = x.permute(0, 2, 3, 1)  # N h w d
        indices = nearest_codes(z.flatten(0, 2), self.quantize.embedding.weight)
        z_q = self.quantize.embedding(indices).view(z.shape)
        loss = (z_q.detach() - z).square().mean() * COMMITMENT + (z_q - z.detach()).square().mean()
        z_q = z + (z_q - z).detach()  # straight-through
        return Quantized(z_q.permute(0, 3, 1, 2), indices, loss)

    @torch.no_grad()
    def fold_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Make the latent zero-mean and unit-variance per channel, and leave D(E(X)) as it is.

        Args:
            mean, std: of the present latent, (d,), over training pictures.
        """
        w, b = self.quant_conv.weight, self.quant_conv.bias  # d c 1 1, d
        b.copy_((b - mean) / std)
        w.div_(std.view(-1, 1, 1, 1))
        w, b = self.post_quant_conv.weight, self.post_quant_conv.bias  # c d 1 1, c
        b.add_(w.flatten(1) @ mean)
        w.mul_(std.view(1, -1, 1, 1))
