"""Image <-> latent: E and D of the paper (the "GT" VQGAN autoencoder, f = 16), used without quantisation.

    E(X) = quant_conv(f(X))                  D(x) = g(post_quant_conv(x))                  as published
    E(X) = quant_conv(f(X)) + W X            D(x) = g(post_quant_conv(x)) + W' x           shortcut: linear

f and g are the networks of `blocks`, W and W' linear maps of 16x16 blocks, each with a bias.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import Decoder, Encoder, LinearMaps, start_linear
from utils.config import require, require_from
from utils.errors import ConfigError

ENCODING = ("encoder", "quant_conv", "shortcut.analysis")  # the parts that make up E, and D
DECODING = ("decoder", "post_quant_conv", "shortcut.synthesis")


@dataclass(frozen=True)
class AutoencoderParams:
    """Size of the image autoencoder. The defaults are the published ones (VQGAN f16-16384).

    Attributes:
        patch: p, a power of two. The picture is folded into cells of p x p pixels before f's first convolution and
            unfolded after g's last, so that f and g work at 1/p of its resolution and below; 1 folds nothing.
        shortcut: `linear` adds a linear map of blocks on either side, and f and g start at zero (residual
            autoencoding, Chen et al. 2025, "Deep Compression Autoencoder"); `fit_linear` fits it before training.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    embed_dim: int = 256
    n_embed: int = 16384  # entries of the VQGAN code book, which the codec never uses; 0 leaves it out
    groups: int = 32
    patch: int = 1
    shortcut: Literal["none", "linear"] = "none"

    def __post_init__(self):
        require_from(1, self, "ch", "ch_mult", "num_res_blocks", "z_channels", "embed_dim", "groups")
        require_from(0, self, "n_embed")
        require(self.ch % self.groups == 0, f"ch {self.ch}: a multiple of groups, {self.groups}")
        require(self.patch > 0 and self.patch.bit_count() == 1, f"patch {self.patch}: a power of two, 1 for none")
        values = 3 * self.downsampling**2  # of a block of pixels
        small = self.shortcut == "none" or self.embed_dim <= values
        require(
            small, f"embed_dim {self.embed_dim}: shortcut linear takes a block's {values} values to at most as many"
        )

    @property
    def downsampling(self) -> int:
        """Pixels per latent position, along each side."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


class LinearBlocks(LinearMaps):
    """W and W': a linear map of the blocks of a picture, 3 b^2 values each, to d channels, and one back.

    They are 1x1 convolutions of the folded picture, as exact and as fast as convolutions of stride b.
    """

    def __init__(self, block: int, channels: int):
        super().__init__(3 * block**2, channels)
        self.block = block

    def encode(self, image: Tensor) -> Tensor:  # N 3 H W -> N d H/b W/b
        return super().encode(F.pixel_unshuffle(image, self.block))

    def decode(self, x: Tensor) -> Tensor:  # N d h w -> N 3 bh bw
        return F.pixel_shuffle(super().decode(x), self.block)


class Autoencoder(nn.Module):
    """E: N x 3 x H x W in [-1, 1] -> N x d x H/16 x W/16, and D back (unclamped). H, W: multiples of 16.

    The linear maps next to the latent also carry its mean and deviation (`fold_statistics`), so that no caller can
    forget them. Results have the precision of the input, whatever autocast made of it inside.
    """

    def __init__(self, params: AutoencoderParams):
        super().__init__()
        self.params = params
        shared = dict(ch=params.ch, ch_mult=params.ch_mult, num_res_blocks=params.num_res_blocks, groups=params.groups)
        self.encoder = Encoder(3 * params.patch**2, params.z_channels, **shared)
        self.decoder = Decoder(params.z_channels, 3 * params.patch**2, **shared)
        if params.n_embed:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(params.n_embed, params.embed_dim)
            self.quantize.embedding.requires_grad_(False)  # no latent of the codec passes through it
        self.quant_conv = nn.Conv2d(params.z_channels, params.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(params.embed_dim, params.z_channels, 1)
        self.shortcut = LinearBlocks(params.downsampling, params.embed_dim) if params.shortcut == "linear" else None
        start_linear(self)
        if self.shortcut:
            nn.init.zeros_(self.encoder.conv_out.weight)
            nn.init.zeros_(self.decoder.conv_out.weight)

    def encode(self, image: Tensor) -> Tensor:  # N 3 H W -> N d h w
        return self.encode_coarse(self.encode_fine(image)).to(image.dtype)

    def encode_fine(self, image: Tensor) -> Tensor:  # N 3 H W -> N c (+ d) h w
        """What E makes of a picture above the latent's resolution, and the linear map's share of the latent."""
        h = self.encoder(F.pixel_unshuffle(image, self.params.patch), only="fine")
        return torch.cat([h, self.shortcut.encode(image)], 1) if self.shortcut else h

    def encode_coarse(self, parts: Tensor) -> Tensor:
        """The rest of E: of what `encode_fine` gives -> N d h w."""
        h, linear = parts.tensor_split([self.encoder.fine_width], 1)
        x = self.quant_conv(self.encoder(h, only="coarse"))
        return x + linear if self.shortcut else x

    def decode(self, x: Tensor) -> Tensor:  # N d h w -> N 3 H W
        return self._with_linear(self.decoder(self.post_quant_conv(x)), x)

    def decode_coarse(self, x: Tensor) -> Tensor:  # N d h w -> N c h w
        """What D makes of a latent at the latent's resolution."""
        return self.decoder(self.post_quant_conv(x), only="coarse")

    def decode_fine(self, h: Tensor, x: Tensor) -> Tensor:
        """The rest of D: of what `decode_coarse` gives, and the latent -> N 3 H W."""
        return self._with_linear(self.decoder(h, only="fine"), x)

    def _with_linear(self, h: Tensor, x: Tensor) -> Tensor:
        image = F.pixel_shuffle(h, self.params.patch)
        return (image + self.shortcut.decode(x) if self.shortcut else image).to(x.dtype)

    def forward(self, image: Tensor, noise: Tensor | None = None, common: bool = False) -> Tensor:
        """D(E(X)), in training D(E(X) + deviation * noise).

        Args:
            noise: N x d x h x w. common: the deviation is that of all channels together, not of each.
        """
        x = self.encode(image)
        if noise is not None:
            x = x + noise * x.detach().std(None if common else (0, 2, 3), keepdim=True)
        return self.decode(x)

    def forget_decoder(self) -> None:
        """Leave E alone, in place: what makes up D takes no memory then, and `decode` is no more."""
        self.post_quant_conv = self.decoder = None
        if self.shortcut:
            self.shortcut.synthesis = None

    def decoding(self) -> list[nn.Module]:
        """The parts that make up D."""
        return [self.post_quant_conv, self.decoder, *([self.shortcut.synthesis] if self.shortcut else [])]

    @torch.no_grad()
    def fold_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Make the latent zero-mean and unit-variance per channel, and leave D(E(X)) as it is.

        Args:
            mean, std: of the present latent, (d,), over training pictures. The same std in all channels scales them by
                one factor, so that they keep the order of their variances.
        """
        self.quant_conv.bias.sub_(mean)
        for conv in [self.quant_conv, *([self.shortcut.analysis] if self.shortcut else [])]:
            conv.bias.div_(std)
            conv.weight.div_(std.view(-1, 1, 1, 1))  # d c 1 1
        for conv in [self.post_quant_conv, *([self.shortcut.synthesis] if self.shortcut else [])]:
            conv.bias.add_(conv.weight.flatten(1) @ mean)  # c
            conv.weight.mul_(std.view(1, -1, 1, 1))  # c d 1 1


@torch.no_grad()
def fit_linear(autoencoder: Autoencoder, pictures: Iterable[Tensor], kept: int = 0) -> Tensor:
    """Set the linear shortcut to the first d principal components of the blocks of training pictures.

    D(E(X)) of an untrained network is then the projection of every block on them, the best that any linear map through
    d channels can do. One scale for all channels gives the latent a variance of 1 on average.

    Args:
        pictures: N x 3 x H x W in [-1, 1] each, H and W multiples of 16; read once.
        kept: channels that stay as they are, the first of a latent that has been widened. The others get the principal
            components of X - D(E(X)), of what these leave, in the scale that these have.
    Returns:
        variances of all 768 components, float64, the largest first; the first d - kept of them are taken.
    Raises:
        ConfigError: pictures all of one colour.
    """
    shortcut = autoencoder.shortcut
    mean, covariance = _block_moments(pictures, shortcut.block, autoencoder if kept else None)
    variances, components = torch.linalg.eigh(covariance)  # ascending; in columns
    variances, components = variances.flip(0).clamp(min=0), components.T.flip(0)
    w = components[: autoencoder.params.embed_dim - kept]  # d 3b^2
    # An eigenvector has no sign of its own: its entry of largest magnitude is made positive.
    w = w * w.gather(1, w.abs().argmax(1, keepdim=True)).sign()
    if kept:
        scale = 1 / shortcut.analysis.weight[:kept].flatten(1).norm(dim=1).mean()
    else:
        scale = variances[: len(w)].mean().sqrt()
    if scale < 1e-3:  # of a range of 2; a smaller deviation is rounding
        raise ConfigError("the linear shortcut cannot be fitted: no training picture has anything but one colour")
    shortcut.analysis.weight[kept:] = (w / scale)[..., None, None].float()
    shortcut.analysis.bias[kept:] = (-w @ mean / scale).float()
    shortcut.synthesis.weight[:, kept:] = (w.T * scale)[..., None, None].float()
    if not kept:
        shortcut.synthesis.bias.copy_(mean)
    return variances


def _block_moments(pictures: Iterable[Tensor], side: int, autoencoder: Autoencoder | None) -> tuple[Tensor, Tensor]:
    """Mean (3b^2,) of the blocks of pictures, and the covariance (3b^2, 3b^2) of them, or of what D(E(X)) leaves of them.

    In float64 on the CPU.
    """
    count, total, left, squares = 0, 0, 0, 0
    for picture in pictures:
        blocks = lacking = _blocks(picture, side)
        if autoencoder:
            device = autoencoder.quant_conv.weight.device
            lacking = blocks - _blocks(autoencoder(picture.to(device)), side)
        count += blocks.shape[1]
        total, left = total + blocks.sum(1), left + lacking.sum(1)
        squares = squares + lacking @ lacking.T
    return total / count, squares / count - torch.outer(left / count, left / count)


def _blocks(picture: Tensor, side: int) -> Tensor:  # N 3 bh bw -> 3b^2 Nhw
    return F.pixel_unshuffle(picture.to("cpu", torch.float64), side).transpose(0, 1).flatten(1)
