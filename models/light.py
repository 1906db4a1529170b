"""Latent -> picture for a tenth of D's operations: the light decoder, distilled from a trained D.

    X^ = g(x^) + W x^        g: blocks at 1/16 of the picture's resolution, blocks at 1/4, a pixel shuffle; W: linear

It reads what D reads, moves no symbol, and is no part of what a release's fingerprint names.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bitstream import CELL
from models.blocks import ResnetBlock, group_norm, start_linear
from utils.config import require, require_from
from utils.precision import without_autocast

FINE = 4  # pixels per position of the finer resolution


@dataclass(frozen=True)
class LightParams:
    """Size of the light decoder. The defaults go with the published networks: 141 GFLOP at 768x512, where D has 1,533.

    Attributes:
        ch: width at 1/16 and at 1/4 of the picture's resolution. num_res_blocks: residual blocks there.
        groups: groups of every normalisation.
    """

    ch: tuple[int, ...] = (512, 128)
    num_res_blocks: tuple[int, ...] = (4, 5)
    groups: int = 32

    def __post_init__(self):
        require_from(1, self, "ch", "num_res_blocks", "groups")
        for name in ("ch", "num_res_blocks"):
            values = getattr(self, name)
            require(len(values) == 2, f"{name} {list(values)}: two numbers, at 1/16 and at 1/4 of the resolution")
        good = all(width % self.groups == 0 for width in self.ch) and self.ch[0] >= 2 * self.groups
        require(good, f"ch {list(self.ch)}: multiples of groups, {self.groups}, and the first at least twice that")


class LightDecoder(nn.Module):
    """N x d x h x w -> N x 3 x 16h x 16w, about [-1, 1], unclamped, in the latent's precision.

    The linear map computes in its own precision, whatever that of the blocks or the autocast: it carries the picture.

    Attributes:
        sha256: of the file that it was loaded from; None while it is being trained.
    """

    def __init__(self, params: LightParams, channels: int):
        super().__init__()
        (coarse, fine), groups = params.ch, params.groups
        self.params = params
        self.conv_in = nn.Conv2d(channels, coarse, 3, padding=1)
        self.coarse = nn.Sequential(*(ResnetBlock(coarse, coarse, groups) for _ in range(params.num_res_blocks[0])))
        self.expand = nn.Conv2d(coarse, fine * (CELL // FINE) ** 2, 1)
        self.fine = nn.Sequential(*(ResnetBlock(fine, fine, groups) for _ in range(params.num_res_blocks[1])))
        self.norm_out = group_norm(fine, groups)
        self.conv_out = nn.Conv2d(fine, 3 * FINE**2, 3, padding=1)
        self.linear = nn.Conv2d(channels, 3 * CELL**2, 1)
        self.sha256: str | None = None
        start_linear(self)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.coarse(self.conv_in(x.to(self.conv_in.weight.dtype)))  # N C h w
        h = self.fine(_shuffled(self.expand(h), CELL // FINE))  # N C' 4h 4w
        h = F.pixel_shuffle(self.conv_out(self.norm_out(h)), FINE)  # N 3 16h 16w
        with without_autocast(x.device):
            return F.pixel_shuffle(self.linear(x), CELL) + h.to(x.dtype)


def _shuffled(x: Tensor, factor: int) -> Tensor:
    """A pixel shuffle that leaves maps as they lie, NHWC too: on CUDA PyTorch's gives NCHW."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return F.pixel_shuffle(x, factor).contiguous(memory_format=layout)


@torch.no_grad()
def fit_linear(decoder: LightDecoder, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Set W to the linear map of latents to pictures with the least squared error, where training starts.

    Args:
        pairs: latents, N x d x h x w, and pictures, N x 3 x 16h x 16w in [-1, 1]; read once.
    Returns:
        the squared error that it leaves, as a share of the blocks' variance; 0 for pictures without any.
    """
    gram, cross, squares, total, count = 0, 0, 0, 0, 0
    for x, image in pairs:
        x, blocks = (t.double().transpose(0, 1).flatten(1) for t in (x, F.pixel_unshuffle(image, CELL)))  # d M, 768 M
        x = torch.cat([x, torch.ones_like(x[:1])])  # and the bias
        gram, cross = gram + x @ x.T, cross + x @ blocks.T
        squares, total, count = squares + blocks.square().sum(), total + blocks.sum(1), count + blocks.shape[1]
    w = torch.linalg.pinv(gram, hermitian=True) @ cross  # d+1 768; channels that never vary take no part
    decoder.linear.weight.copy_(w[:-1].T[..., None, None])
    decoder.linear.bias.copy_(w[-1])
    variance = squares - total.square().sum() / count
    return float((squares - (w * cross).sum()) / variance) if variance > 0 else 0.0
