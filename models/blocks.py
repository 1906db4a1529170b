"""Parts that the networks share: normalisation, residual and attention blocks, changes of resolution.

Parameter names follow the published state dicts, so that public VQGAN weights load.
Axes: N batch, C channels, H and W rows and columns of a feature map.
"""

from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import attention
from models.layers.norms import GroupNorm, added, convolved
from models.layers.sharing import shared, spread
from utils.precision import without_autocast

AUTOENCODER_NORM_EPS = 1e-6  # the UNet's normalisation uses 1e-5
VECTORS = 8192  # that are compared with a code book at once: more than a picture has that is coded whole


def start_linear(network: nn.Module) -> None:
    """Weights to train an autoencoder of these blocks from: every residual branch starts at zero and every convolution
    keeps the variance of its input. So the picture reaches the latent, and the gradient the first layer, from the first
    step on; with PyTorch's own start each of the convolutions in between divides the signal by about 1.7.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, AttnBlock):
            nn.init.zeros_(module.proj_out.weight)


def local_mean(x: Tensor) -> Tensor:
    """Mean over the 3x3 positions around each, those that there are: N x C x H x W as given."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def finished(image: Tensor, sharpening: float, colour_blur: float) -> Tensor:
    """X with more detail in its grey, g + a (g - m g), and less in its colour, c + b (m c - c): N x 3 x H x W.

    g is the mean of RGB, c = X - g, and m a mean over 3x3 pixels. a = b = 0 changes no bit.
    """
    if not (sharpening or colour_blur):
        return image
    grey = image.mean(1, keepdim=True)
    colour = image - grey
    sharper = grey + sharpening * (grey - local_mean(grey))
    return sharper + colour + colour_blur * (local_mean(colour) - colour)


def group_norm(channels: int, groups: int, silu: bool = True) -> GroupNorm:
    """Group normalisation of the autoencoders (32 groups in the published networks), SiLU after it unless told."""
    return GroupNorm(groups, channels, AUTOENCODER_NORM_EPS, silu)


class ResnetBlock(nn.Module):
    """x + conv(silu(GN(conv(silu(GN(x)))))), with a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # N C_in H W
        h, bias = convolved(self.conv1, self.norm1(x))  # N C_out H W
        h, bias = convolved(self.conv2, self.norm2(h, before=bias))  # N C_out H W
        return added(self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x, h, bias)


class AttnBlock(nn.Module):
    """x + proj(V softmax(QK / sqrt(C))): one head over all positions of the feature map.

    Inside `sharing`, over positions spread evenly over the first pass's maps, the same for all maps of all passes: so its
    cost grows with the size, not with its square, and tiles have no seams.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups, silu=False)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # N C H W
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        k, v = (m.expand(len(x), -1, -1, -1) for m in shared(self, lambda: (spread(k), spread(v))) or (k, v))
        # Contiguous, because only then the kernel whose memory does not grow with the square of HW is taken.
        # The view gives strides that are multiples of C even where HW = 1; CUDA's kernels refuse others.
        shape = (len(x), 1, -1, x.shape[1])  # N 1 HW C
        q, k, v = (m.flatten(2).transpose(1, 2).contiguous().view(shape) for m in (q, k, v))
        h = attention(q, k, v)  # N 1 HW C
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)  # N C H W
        return added(x, *convolved(self.proj_out, h))


def halving(channels: int) -> nn.Sequential:
    """N C H W -> N C H/2 W/2: stride 2; one row and one column of zeros are added at the bottom and right only."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2)))


def doubling(channels: int) -> nn.Sequential:
    """N C H W -> N C 2H 2W: nearest neighbours and a convolution."""
    return nn.Sequential(
        OrderedDict(nearest=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(channels, channels, 3, padding=1))
    )


class Resolution(nn.Module):
    """One resolution of an encoder or decoder: residual blocks, each followed by attention where asked."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, groups: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        self.attn = nn.ModuleList(AttnBlock(out_channels, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Feature maps from full resolution down by 2^(resolutions - 1); attention at the last.

    Args:
        in_channels: channels of the input; out_channels: channels of the result.
        ch, ch_mult: width of resolution i is ch * ch_mult[i].
        num_res_blocks: residual blocks per resolution. groups: groups of every normalisation.
    """

    def __init__(self, in_channels, out_channels, ch, ch_mult, num_res_blocks, groups):
        super().__init__()
        widths = [ch] + [ch * m for m in ch_mult]
        last = len(ch_mult) - 1
        self.fine_width = widths[-2]  # channels of what the resolutions above the last give
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            part = Resolution(widths[i], widths[i + 1], num_res_blocks, attention=i == last, groups=groups)
            if i != last:
                part.downsample = halving(widths[i + 1])
            self.down.append(part)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    @property
    def fine_norms(self) -> int:
        """Normalisations of the resolutions above the last."""
        return sum(isinstance(module, GroupNorm) for part in self.down[:-1] for module in part.modules())

    def forward(self, x: Tensor, only: Literal["fine", "coarse"] | None = None) -> Tensor:
        """N C_in H W -> N C_out H/2^(L-1) W/2^(L-1).

        Args:
            only: `fine`, the resolutions above the last, which give maps of that; `coarse`, all the rest, of such maps.
        """
        h = x if only == "coarse" else self._fine(x)
        return h if only == "fine" else self._coarse(h)

    def _fine(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for part in self.down[:-1]:
            h = part.downsample(part(h))
        return h

    def _coarse(self, h: Tensor) -> Tensor:
        return self.conv_out(self.norm_out(self.mid(self.down[-1](h))))


class Decoder(nn.Module):
    """The mirror of `Encoder`, with one residual block more per resolution."""

    def __init__(self, in_channels, out_channels, ch, ch_mult, num_res_blocks, groups):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i in range(len(ch_mult)):
            above = widths[min(i + 1, last)]
            part = Resolution(above, widths[i], num_res_blocks + 1, attention=i == last, groups=groups)
            if i != 0:
                part.upsample = doubling(widths[i])
            self.up.append(part)
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which VQGAN's adaptive factor of the adversarial term is measured."""
        return self.conv_out.weight

    @property
    def fine_reach(self) -> float:
        """How far a value of the result depends on maps of the lowest resolution, in positions: without what norms share.

        Every 3x3 convolution adds one position of its own resolution: two of each block, one behind each doubling, one last.
        """
        widths = [(2 * len(part.block) + 1) / 2 ** (len(self.up) - 1 - i) for i, part in enumerate(self.up[:-1])]
        return sum(widths) + 1 / 2 ** (len(self.up) - 1)

    def forward(self, z: Tensor, only: Literal["coarse", "fine"] | None = None) -> Tensor:
        """N C_in h w -> N C_out h*2^(L-1) w*2^(L-1).

        Args:
            only: `coarse`, the lowest resolution, which gives maps of that; `fine`, all the rest, of such maps.
        """
        h = z if only == "fine" else self._coarse(z)
        return h if only == "coarse" else self._fine(h)

    def _coarse(self, z: Tensor) -> Tensor:
        return self.up[-1](self.mid(self.conv_in(z)))

    def _fine(self, h: Tensor) -> Tensor:
        for above, part in zip(reversed(self.up[1:]), reversed(self.up[:-1]), strict=True):
            h = part(above.upsample(h))
        return self.conv_out(self.norm_out(h))


class LinearMaps(nn.Module):
    """Two linear maps of every position, from n to m channels and back, each with a bias.

    They compute in their own precision whatever the autocast: they carry the signal, and the networks beside them only
    what they lack.
    """

    def __init__(self, n: int, m: int):
        super().__init__()
        self.analysis = nn.Conv2d(n, m, 1)
        self.synthesis = nn.Conv2d(m, n, 1)

    def encode(self, x: Tensor) -> Tensor:  # N n h w -> N m h w
        with without_autocast(x.device):
            return self.analysis(x)

    def decode(self, x: Tensor) -> Tensor:  # N m h w -> N n h w
        with without_autocast(x.device):
            return self.synthesis(x)


def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code nearest to every vector; the first one on a tie.

    Args:
        z: vectors, (M, d). codebook: (K, d).
    Returns:
        indices, int64 (M,): argmin_j |z|^2 + |v_j|^2 - 2 z.v_j, in the code book's precision whatever the autocast.
    """
    with without_autocast(z.device):
        return torch.cat([distances(part.to(codebook.dtype), codebook).argmin(1) for part in z.split(VECTORS)])


def distances(z: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances of vectors (M, d) to codes (K, d), whatever the autocast: (M, K)."""
    with without_autocast(z.device):
        return z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.t()
