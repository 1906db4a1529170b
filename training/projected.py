"""A discriminator on fixed features of a trained network (Projected GAN, Sauer et al., NeurIPS 2021), which needs few
pictures and little training: only small heads learn, one for each resolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from training.perceptual_networks import Lite0

WIDTH = 64
CHANNELS = (24, 40, 112, 320)  # of Lite0 at 1/4, 1/8, 1/16 and 1/32 of the resolution
DOWNS = (4, 3, 2, 1)  # halvings of each head: a logit for every 64 x 64 pixels
SHIFT = 1 / 8  # of a side, the largest translation
CUT = 1 / 2  # of a side, the erased square


class ProjectedDiscriminator(nn.Module):
    """N x 3 x H x W in [-1, 1] -> N x M logits, those of all resolutions together. H, W: from 64.

    f_l = mix_l(Lite0_l(augmented X)) + up(f_(l+1)), each sum convolved by 3x3: fixed random mixing across channels and
    resolutions, so that no head can hang on a few features. The heads are spectrally normalised.

    Raises:
        ConfigError: the packages of Lite0 are not installed.
    """

    def __init__(self):
        super().__init__()
        self.features = Lite0()
        self.channels = nn.ModuleList(nn.Conv2d(c, WIDTH, 1, bias=False) for c in CHANNELS)
        self.resolutions = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in CHANNELS)
        for conv in [*self.channels, *self.resolutions]:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
            conv.requires_grad_(False)
        self.heads = nn.ModuleList(_head(downs) for downs in DOWNS)
        self.calls = 0  # seeds the augmentation, so that a resumed run draws what it would have drawn

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        h = self.mixed(augmented(image, torch.Generator().manual_seed(self.calls)))
        return torch.cat([head(f).flatten(1) for head, f in zip(self.heads, h, strict=True)], dim=1).to(image.dtype)

    def mixed(self, image: Tensor) -> list[Tensor]:
        """The fixed features at 1/4 to 1/32 of the resolution, N x 64 x h x w each."""
        found: list[Tensor] = []
        layers = zip(self.features(image)[1:], self.channels, self.resolutions, strict=True)
        for f, across_channels, across_resolutions in reversed(list(layers)):
            h = across_channels(f)
            if found:
                h = h + F.interpolate(found[0], size=h.shape[2:], mode="bilinear", align_corners=False)
            found.insert(0, across_resolutions(h))
        return found

    def get_extra_state(self) -> int:
        return self.calls

    def set_extra_state(self, calls: int) -> None:
        self.calls = calls


def _head(downs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(downs):
        layers += [spectral_norm(nn.Conv2d(WIDTH, WIDTH, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(WIDTH, 1, 3, padding=1)))


def augmented(image: Tensor, generator: torch.Generator) -> Tensor:
    """Differentiable augmentation (Zhao et al., NeurIPS 2020): colour, translation and an erased square, each sample its own.

    Brightness moves by up to half of white; saturation is multiplied by 0 to 2, contrast by 0.5 to 1.5; the picture moves by
    up to 1/8 of its sides over grey, and a square of half of them turns grey.

    Args:
        image: N x 3 x H x W in [-1, 1]. generator: of the CPU, whatever the picture's device.
    """
    n, _, height, width = image.shape
    u = torch.rand(7, n, 1, 1, 1, generator=generator).to(image)
    image = image + (u[0] * 2 - 1)
    grey = image.mean(1, keepdim=True)
    image = grey + (image - grey) * 2 * u[1]
    mean = image.mean((1, 2, 3), keepdim=True)
    image = mean + (image - mean) * (u[2] + 0.5)
    rows, columns = torch.arange(height, device=image.device), torch.arange(width, device=image.device)
    y = rows + ((2 * u[3, :, 0, 0] - 1) * SHIFT * height).round().long()  # N H
    x = columns + ((2 * u[4, :, 0, 0] - 1) * SHIFT * width).round().long()  # N W
    seen = _inside(y, 0, height)[:, :, None] & _inside(x, 0, width)[:, None]  # N H W
    top, left = (u[5, :, 0, 0] * height).long(), (u[6, :, 0, 0] * width).long()  # of the square's middle, N 1
    cut_y, cut_x = round(CUT * height / 2), round(CUT * width / 2)
    erased = _inside(rows, top - cut_y, top + cut_y)[:, :, None] & _inside(columns, left - cut_x, left + cut_x)[:, None]
    sample = torch.arange(n, device=image.device)[:, None, None]
    moved = image[sample, :, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None]]  # N H W 3
    return (moved * (seen & ~erased)[..., None]).movedim(3, 1)


def _inside(position: Tensor, first: int | Tensor, end: int | Tensor) -> Tensor:
    return (position >= first) & (position < end)
