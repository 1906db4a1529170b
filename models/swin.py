"""Swin layers of the denoiser: attention inside (shifted) windows of a feature map.

Axes: N batch, C embedding width, H and W rows and columns, w window side, T = w*w tokens of a window,
L = (H/w)*(W/w) windows in row-major order.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models.layers.attention import attention
from models.layers.kept import Kept
from models.layers.norms import GroupNorm

SEPARATED = -100.0  # added to the logit of two tokens that must not see each other
SIZES = 4  # of feature maps whose masks and biases are kept between calls
KEPT = 4096  # positions, at most, of such maps: larger ones are no slower for making them anew, and theirs are large


def keeps(positions: int) -> bool:
    """Whether masks and biases of maps of so many positions are kept: in coding, not where weights are learning."""
    return positions <= KEPT and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for every pair of tokens of a window: int64 (T, T) (Swin, Liu et al. 2021, Eq. 4)."""
    coords = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)  # 2 T
    dy, dx = coords[:, :, None] - coords[:, None, :]  # T T
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


def shifted_window_mask(height: int, width: int, window: int, shift: int, device: torch.device | None = None) -> Tensor:
    """The published denoiser's addition to the logits of shifted windows: float32 (L, T, T).

    This is not Swin's mask. Published weights were trained with it, so it has to be kept: only windows of the last
    row of windows are masked, and in them the tokens whose *column* is below w - shift are separated from the rest.
    The right-hand column of windows, which wraps around, is not masked.
    """
    left = torch.arange(window, device=device).repeat(window) < window - shift  # T, by the token's column
    separated = torch.where(left[:, None] != left[None, :], SEPARATED, 0.0)
    rows, columns = height // window, width // window
    mask = torch.zeros(rows, columns, *separated.shape, device=device)
    if shift:
        mask[-1] = separated
    return mask.flatten(0, 1)


def to_windows(x: Tensor, window: int) -> Tensor:  # N C H W -> N*L T C
    n, c, h, w = x.shape
    x = x.view(n, c, h // window, window, w // window, window)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, window * window, c)


def from_windows(tokens: Tensor, window: int, height: int, width: int) -> Tensor:  # N*L T C -> N C H W
    c = tokens.shape[-1]
    x = tokens.view(-1, height // window, width // window, window, window, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, c, height, width)


class WindowAttention(nn.Module):
    """Multi-head attention inside a window, with a learned bias for every relative position and head."""

    def __init__(self, dim: int, window: int, heads: int):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.kept = Kept(SIZES)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:  # N*L T C, (L T T)
        b, t, c = tokens.shape
        q, k, v = self.qkv(tokens).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # B heads T c
        h = attention(q, k, v, self.bias(mask, b, q.dtype))
        return self.proj(h.transpose(1, 2).reshape(b, t, c))

    def bias(self, mask: Tensor | None, windows: int, dtype: torch.dtype) -> Tensor:
        """What is added to the logits of so many windows: (1 or N*L) heads T T."""
        table = self.relative_position_bias_table
        if not keeps(windows * len(self.relative_position_index)):
            return self._bias(mask, windows, dtype)
        # The mask, which is kept as well, stands for size and device; kept along, it stays the only one of its identity.
        key = id(mask), windows, dtype, table.data_ptr(), table.dtype, None if table.is_inference() else table._version
        return self.kept.get(key, lambda: (self._bias(mask, windows, dtype), mask))[0]

    def _bias(self, mask: Tensor | None, windows: int, dtype: torch.dtype) -> Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # heads T T
        bias = bias.unsqueeze(0)
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(windows // len(mask), 1, 1, 1)  # N*L heads T T
        return bias.to(dtype)


def mlp(dim: int, hidden: int) -> nn.Sequential:
    """Two 1x1 convolutions with the exact (erf) GELU between them."""
    return nn.Sequential(OrderedDict(fc1=nn.Conv2d(dim, hidden, 1), act=nn.GELU(), fc2=nn.Conv2d(hidden, dim, 1)))


class SwinBlock(nn.Module):
    """x + attention(GN(x)), then x + mlp(GN(x)). Normalised over the whole feature map, not per token."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, mlp_ratio: int, groups: int):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = GroupNorm(groups, dim)
        self.attn = WindowAttention(dim, window, heads)
        self.norm2 = GroupNorm(groups, dim)
        self.mlp = mlp(dim, dim * mlp_ratio)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # N C H W
        h = self.norm1(x)
        if self.shift:
            h = torch.roll(h, (-self.shift, -self.shift), dims=(2, 3))
        h = from_windows(self.attn(to_windows(h, self.window), mask), self.window, *x.shape[2:])
        if self.shift:
            h = torch.roll(h, (self.shift, self.shift), dims=(2, 3))
        x = x + h
        return x + self.mlp(self.norm2(x))


def projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution between the UNet's width and the embedding width."""
    return nn.Sequential(OrderedDict(proj=nn.Conv2d(in_channels, out_channels, 1)))


class SwinLayer(nn.Module):
    """Projection, blocks (every second one with shifted windows), projection back; no residual around the layer."""

    def __init__(self, channels, embed_dim, depth, head_channels, window, mlp_ratio, groups):
        super().__init__()
        self.window, self.shift = window, window // 2
        self.patch_embed = projection(channels, embed_dim)
        self.blocks = nn.ModuleList(
            SwinBlock(embed_dim, embed_dim // head_channels, window, (i % 2) * self.shift, mlp_ratio, groups)
            for i in range(depth)
        )
        self.patch_unembed = projection(embed_dim, channels)
        self.kept = Kept(SIZES)

    def forward(self, x: Tensor) -> Tensor:  # N C H W; H and W multiples of the window
        mask = self._mask(*x.shape[2:], x.device)
        x = self.patch_embed(x)
        for block in self.blocks:
            x = block(x, mask if block.shift else None)
        return self.patch_unembed(x)

    def _mask(self, height: int, width: int, device: torch.device) -> Tensor:  # L T T
        size = height, width, self.window, self.shift, device
        if not keeps(height * width):
            return shifted_window_mask(*size)
        # What inference mode makes is of no use outside it.
        return self.kept.get((*size, torch.is_inference_mode_enabled()), lambda: shifted_window_mask(*size))
