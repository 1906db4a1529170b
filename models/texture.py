"""Texture that D leaves out of a picture: detail that is there made stronger, and grain where there is none.

    g~ = g + sum_k a_k (f_k * g) + sum_k s_k (h_k * n)        g: grey of X^, the mean of RGB; n: white noise

f_k and h_k are filters of 9x9 pixels that see no flat colour. A small network reads from X^ and x^ how much of each there
should be in every cell of 4x4 pixels: a_k and s_k. Colour stays as it is. It moves no symbol, and costs 7 GFLOP at 768x512.
The noise has a seed, so that a file has one picture; two seeds differ in grain and in nothing else.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bitstream import CELL
from models.residual_networks import Block
from utils.config import require, require_from
from utils.precision import without_autocast

SIDE = 9  # of a filter, in pixels
FINE = 4  # pixels per cell, along each side
# Wavelengths of the oriented filters at the start, and deviations of their windows, in pixels.
WAVES = ((3.0, 1.3), (6.0, 2.2))
ANGLES = 4
FILTERS = 2 + len(WAVES) * ANGLES
GRAIN = 0.005  # deviation of each kind of grain at the start, of a range of 2
ENERGY = 1e-5  # added to the energy of a filter's response: 0.4 grey values
MOST = 4.0  # of log(s / GRAIN)


@dataclass(frozen=True)
class TextureParams:
    """Size of the texture network. The defaults are those of the small model.

    Attributes:
        width: channels of its maps. num_res_blocks: of two convolutions each.
        fade: share of the texture that files of the residual's last level go without; those of level L / 2 and below have
            all of it. Training knows nothing of it.
    """

    width: int = 48
    num_res_blocks: int = 2
    fade: float = 0.0

    @property
    def rules(self) -> dict[str, float]:
        """What may change after training: no network is of another size by it."""
        return {"fade": self.fade}

    def __post_init__(self):
        require_from(1, self, "width", "num_res_blocks")
        require(0 <= self.fade <= 1, f"fade {self.fade}: 0 to 1")


def filters() -> Tensor:
    """Where the filters start, FILTERS x 1 x 9 x 9, of norm 1: what 3x3 pixels average away, what 7x7 do of the rest, and
    waves of two lengths in four directions. The values of each have a sum of 0.
    """
    point, box = torch.zeros(SIDE, SIDE), torch.zeros(SIDE, SIDE)
    middle = SIDE // 2
    point[middle, middle], box[middle - 1 : middle + 2, middle - 1 : middle + 2] = 1.0, 1 / 9
    wide = F.conv2d(box[None, None], torch.full((1, 1, 7, 7), 1 / 49), padding=3)[0, 0]
    found = [point - box, box - wide]
    row, column = torch.meshgrid(*[torch.arange(SIDE) - float(middle)] * 2, indexing="ij")
    for length, deviation in WAVES:
        window = torch.exp(-(row**2 + column**2) / (2 * deviation**2))
        for i in range(ANGLES):
            along = column * math.cos(math.pi * i / ANGLES) + row * math.sin(math.pi * i / ANGLES)
            wave = window * torch.cos(2 * math.pi * along / length)
            found.append(wave - window * wave.sum() / window.sum())
    bank = torch.stack(found)[:, None]
    return bank / bank.square().sum((1, 2, 3), keepdim=True).sqrt()


class Texture(nn.Module):
    """X^, x^ and white noise -> X^ with texture: N x 3 x 16h x 16w in about [-1, 1], N x d x h x w and N x 256 x h x w, all float32.

    The noise of a latent position lies over its 16x16 pixels, row by row. An untrained one changes nothing but by grain
    of GRAIN.
    """

    def __init__(self, params: TextureParams, channels: int):
        super().__init__()
        width = params.width
        self.params = params
        self.filters, self.grains = nn.Parameter(filters()), nn.Parameter(filters())
        self.picture_in = nn.Conv2d(3 * FINE**2 + FILTERS, width, 3, padding=1)
        self.latent_in = nn.Conv2d(channels, width, 1)
        # Without normalisation: a cell depends on those around it alone.
        self.blocks = nn.Sequential(*(Block(width) for _ in range(params.num_res_blocks)))
        self.conv_out = nn.Conv2d(width, 2 * FILTERS, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, image: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        with without_autocast(x.device):
            grey = image.mean(1, keepdim=True)
            detail = seen_by(self.filters, grey)
            gain, deviation = self.amounts(image, detail, x)
            textured = image + (over_pixels(gain) * detail).sum(1, keepdim=True)
            del detail  # a large picture's takes memory
            grain = seen_by(self.grains, F.pixel_shuffle(noise, CELL))
            return textured + (over_pixels(deviation) * grain).sum(1, keepdim=True)

    def amounts(self, image: Tensor, detail: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """a and s of every cell, N x FILTERS x 4h x 4w each, of a picture, its detail (f_k * g) and its latent."""
        energy = (F.avg_pool2d(detail.square(), FINE) + ENERGY).log()
        h = self.picture_in(torch.cat([F.pixel_unshuffle(image, FINE), 0.5 * energy + 4], 1))
        h = self.blocks(h + F.interpolate(self.latent_in(x), scale_factor=CELL // FINE))
        gain, log = self.conv_out(F.silu(h)).chunk(2, 1)
        return gain, GRAIN * log.clamp(max=MOST).exp()


def seen_by(bank: Tensor, grey: Tensor) -> Tensor:
    """What filters, K x 1 x 9 x 9, find in a map, N x 1 x H x W: N x K x H x W. Flat colour gives 0, at the edges too."""
    bank = bank - bank.mean((2, 3), keepdim=True)
    return F.conv2d(F.pad(grey, (SIDE // 2,) * 4, mode="replicate"), bank)


def over_pixels(cells: Tensor) -> Tensor:
    """Values of cells at each of their pixels, linear between the cells' middles: N x K x h x w -> N x K x 4h x 4w."""
    return F.interpolate(cells, scale_factor=FINE, mode="bilinear", align_corners=False)
