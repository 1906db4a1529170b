"""The denoiser U: one call predicts the clean latent from the noisy one and the base code.

A UNet with Swin layers (the published `UNetModelSwin`); parameter names follow its state dict.
Axes: N batch, C channels, h and w latent rows and columns.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import doubling
from models.layers.norms import GroupNorm
from models.swin import SwinLayer
from utils.config import require, require_from


@dataclass(frozen=True)
class UNetParams:
    """Size of the denoiser. The defaults are the published ones."""

    latent_channels: int = 256  # channels of x and of the prediction
    condition_channels: int = 256  # channels of lq = z_q
    condition_width: int = 64  # channels that lq contributes to the first convolution
    model_channels: int = 160
    channel_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    windows: tuple[int, ...] = (4, 4, 4, 2)  # window side per resolution
    middle_window: int = 2
    swin_depth: int = 2
    swin_embed_dim: int = 192
    head_channels: int = 32
    mlp_ratio: int = 4
    groups: int = 32

    def __post_init__(self):
        positive = [f.name for f in fields(self) if f.name not in ("num_res_blocks", "swin_depth")]
        require_from(1, self, *positive)
        require_from(0, self, "num_res_blocks", "swin_depth")
        levels, windows = list(self.channel_mult), list(self.windows)
        require(len(levels) == len(windows), f"windows {windows}: one for each resolution of channel_mult {levels}")
        for name, divisor in (
            ("model_channels", "groups"),
            ("swin_embed_dim", "groups"),
            ("swin_embed_dim", "head_channels"),
        ):
            value, by = getattr(self, name), getattr(self, divisor)
            require(value % by == 0, f"{name} {value}: a multiple of {divisor}, {by}")
        require(
            self.model_channels % 2 == 0, f"model_channels {self.model_channels}: even (half for cosines of the time)"
        )

    @property
    def size_multiple(self) -> int:
        """Latent sides must be multiples of this inside the network (16 as published)."""
        sides = [window << i for i, window in enumerate(self.windows)]
        return math.lcm(*sides, self.middle_window << (len(self.windows) - 1))


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding, cosine half first: (N,) steps, real numbers allowed -> float32 (N, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    args = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class ResBlock(nn.Module):
    """Residual block whose second normalisation is scaled and shifted by the time embedding."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(groups, in_channels, silu=True), nn.Identity(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, out_channels, silu=True),
            nn.Identity(),
            nn.Identity(),  # the published block has SiLU and a dropout of zero here; they keep the key `out_layers.3`
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        nn.init.zeros_(self.out_layers[3].weight)  # every block starts as the identity
        nn.init.zeros_(self.out_layers[3].bias)
        self.skip_connection = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # N C_in h w, N E
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        norm, *rest = self.out_layers
        h = norm(self.in_layers(x), scale, shift)  # N C_out h w
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


def halving(channels: int) -> nn.Sequential:
    """N C h w -> N C h/2 w/2: stride 2, padded on all sides."""
    return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


class Stage(nn.Sequential):
    """A sequence in which residual blocks also receive the time embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """x_hat = U(scaled noisy latent, t, lq). Any latent size: padding to `size_multiple` happens here, by edge values."""

    def __init__(self, params: UNetParams):
        super().__init__()
        self.params = params
        p, ch = params, params.model_channels
        emb = 4 * ch
        widths = [ch * m for m in p.channel_mult]
        last = len(widths) - 1

        def res(a: int, b: int) -> ResBlock:
            return ResBlock(a, b, emb, p.groups)

        def swin(channels: int, window: int) -> SwinLayer:
            return SwinLayer(channels, p.swin_embed_dim, p.swin_depth, p.head_channels, window, p.mlp_ratio, p.groups)

        self.time_embed = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.conv_in_extended = nn.Conv2d(p.condition_channels, p.condition_width, 3, padding=1)
        first = nn.Conv2d(p.latent_channels + p.condition_width, ch, 3, padding=1)
        self.input_blocks = nn.ModuleList([Stage(first)])
        skips, width = [ch], ch
        for depth, below in enumerate(widths):
            for i in range(p.num_res_blocks):
                block = [res(width, below)]
                width = below
                if i == 0:
                    block.append(swin(width, p.windows[depth]))
                self.input_blocks.append(Stage(*block))
                skips.append(width)
            if depth != last:
                self.input_blocks.append(Stage(halving(width)))
                skips.append(width)

        self.middle_block = Stage(res(width, width), swin(width, p.middle_window), res(width, width))

        self.output_blocks = nn.ModuleList()
        for depth in range(last, -1, -1):
            for i in range(p.num_res_blocks + 1):
                block = [res(width + skips.pop(), widths[depth])]
                width = widths[depth]
                if i == 0:
                    block.append(swin(width, p.windows[depth]))
                if depth and i == p.num_res_blocks:
                    block.append(doubling(width))
                self.output_blocks.append(Stage(*block))

        self.out = nn.Sequential(
            GroupNorm(p.groups, width, silu=True), nn.Identity(), nn.Conv2d(width, p.latent_channels, 3, padding=1)
        )

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which VQGAN's adaptive factor of the adversarial term is measured in stage `codec`."""
        return self.out[-1].weight

    def start_silent(self) -> None:
        """Weights to train from that predict 0 everywhere."""
        nn.init.zeros_(self.last_layer)
        nn.init.zeros_(self.out[-1].bias)

    def forward(self, x: Tensor, t: Tensor, lq: Tensor) -> Tensor:
        """Predict the clean latent.

        Args:
            x: scaled noisy latent, N x d x h x w.
            t: time, (N,), in steps of the schedule, not necessarily whole.
            lq: condition z_q, N x d_q at the size of x or at half of it (then doubled, nearest neighbour).
        Returns:
            predicted latent, as x.
        """
        size, dtype = x.shape[2:], x.dtype
        if lq.shape[2:] != size:
            lq = F.interpolate(lq, scale_factor=2.0, mode="nearest")
        x, lq = (self._pad(v) for v in (x, lq))
        emb = timestep_embedding(t, self.params.model_channels).to(self.time_embed[0].weight.dtype)
        emb = self.time_embed(emb)  # N E
        h = torch.cat([x, self.conv_in_extended(lq)], dim=1)  # N d+c h w
        skips = []
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)[:, :, : size[0], : size[1]].to(dtype)

    def _pad(self, x: Tensor) -> Tensor:
        """Rows and columns repeated at the end. Not F.pad, whose compiled backward pass fails where layouts differ."""
        for dim in (2, 3):
            side = x.shape[dim]
            if missing := -side % self.params.size_multiple:
                x = x.index_select(dim, torch.arange(side + missing, device=x.device).clamp(max=side - 1))
        return x
