"""The terms that training minimises: distortion, perceptual, commitment and adversarial terms.

Pictures are N x 3 x H x W in [-1, 1]; every term is a scalar, averaged over the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bitstream import CELL
from utils.imports import quiet

# BT.601 luma of RGB in [0, 1]
LUMA = (0.299, 0.587, 0.114)
GROUND = 64  # side of a block of smooth ground, in pixels
LEAST_LINES = 12 * CELL  # pixels of a spectrum whose lines have neighbours of their own
NEIGHBOURS = range(2, 6)  # bins of the spectrum on either side that a line is compared with
TINY = 1e-12  # of a power: no error is exactly 0 there
SMOOTH = 8.0  # grey values: the largest deviation of the original's luma inside one


def distortion(image: Tensor, target: Tensor) -> Tensor:
    """||X - X^||^2, the mean over pixels and channels (DiffO, Eq. 10)."""
    return F.mse_loss(image, target)


def chroma_distortion(image: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the colour alone: of RGB without the mean of its channels."""
    error = image - target
    return (error - error.mean(1, keepdim=True)).square().mean()


def commitment(z: Tensor, z_q: Tensor) -> Tensor:
    """||sg(z_q) - VQ-E(x)||^2, a mean (DiffO, Eq. 10). The code-book term has no gradient here: averages move it."""
    return F.mse_loss(z, z_q.detach())


def ms_ssim_loss(image: Tensor, target: Tensor) -> Tensor:
    """1 - MS-SSIM of the luma: a perceptual term that needs no weights. Sides from 161 pixels."""
    with quiet():
        from pytorch_msssim import ms_ssim

    shares = torch.tensor(LUMA, device=image.device, dtype=image.dtype).view(1, 3, 1, 1)
    luma, reference = (((v + 1) / 2 * shares).sum(1, keepdim=True) for v in (image, target))
    return 1 - ms_ssim(luma, reference, data_range=1.0)


def weave_loss(image: Tensor, target: Tensor) -> Tensor:
    """Power of what repeats every 16 pixels in the luma error of smooth ground, where the eye finds it.

        loss = max(0, mean over blocks b of s_b mean over pairs of their n = 16 cells, i != j, of <e_i, e_j>)
             = max(0, mean over blocks b of s_b (n |mean_i e_i|^2 - mean_i |e_i|^2) / (n - 1))

    e_i is the error in a cell of 16x16 pixels less its mean, |.|^2 and <., .> are means over pixels. What cells share is
    counted whole, grain of their own not at all: its products are 0 on average. Blocks are 64x64 pixels, 32 apart; s_b is 1
    where the original is smooth, its luma (the mean of RGB) deviating by less than 8 grey values, and 0 elsewhere.
    """
    n = (GROUND // CELL) ** 2
    luma, reference = (F.unfold(v.mean(1, keepdim=True), GROUND, stride=GROUND // 2) for v in (image, target))
    smooth = (reference.std(1, correction=0) < SMOOTH / 127.5).to(luma)
    cells = (luma - reference).unflatten(1, (GROUND // CELL, CELL, GROUND // CELL, CELL))
    e = cells - cells.mean((2, 4), keepdim=True)
    shared, own = e.mean((1, 3)).square().mean((1, 2)), e.square().mean((1, 2, 3, 4))  # N x blocks
    power = (n * shared - own) / (n - 1)
    return (smooth * power).mean().relu()


def lines_loss(image: Tensor, target: Tensor) -> Tensor:
    """How far the luma error's power at multiples of 1/16 cycles per pixel stands out from its neighbours.

        loss = mean over k = 1 .. 8 and both axes of max(0, ln(P(k/16) / mean_b P(k/16 + b)))

    P is the power of the error (of the mean of RGB) by frequency along one axis, a mean over the batch and the other axis; b
    are 2 to 5 bins on either side, inside the spectrum. Only the line has a gradient: a line must not hide among louder
    neighbours. Sides from 192 pixels, cut to multiples of 16. A pixel shuffle makes such lines.
    """
    error = (image - target).mean(1)
    height, width = (side // CELL * CELL for side in error.shape[1:])
    error = error[:, :height, :width]
    excess = []
    for axis, length in ((2, width), (1, height)):
        power = torch.view_as_real(torch.fft.rfft(error, dim=axis)).square().sum(-1).mean((0, 3 - axis))
        for line, beside in line_bins(length):
            around = power[beside].mean().detach()
            excess.append((power[line].clamp(min=TINY).log() - around.clamp(min=TINY).log()).relu())
    return torch.stack(excess).mean()


def line_bins(length: int) -> list[tuple[int, list[int]]]:
    """Bins of a spectrum (length / 2 + 1,) at 1/16 to 8/16 cycles per pixel, each with the bins 2 to 5 away from it."""
    return [
        (at, [at + sign * n for n in NEIGHBOURS for sign in (-1, 1) if at + sign * n <= length // 2])
        for at in range(length // CELL, length // 2 + 1, length // CELL)
    ]


class PatchDiscriminator(nn.Module):
    """Scores overlapping 70x70 patches (PatchGAN, Isola et al. 2017): N x 3 x H x W -> N x 1 x h' x w' logits.

    Instance rather than batch normalisation: a score must not depend on who else is in the batch or on which rank.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        stack: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            stride = 2 if i < layers - 1 else 1
            stack += [
                nn.Conv2d(a, b, 4, stride=stride, padding=1),
                nn.InstanceNorm2d(b, affine=True),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*stack, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        return self.main(image).to(image.dtype)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(E max(0, 1 - D(X)) + E max(0, 1 + D(X^))) / 2 (VQGAN, Esser et al. 2021)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """-E D(X^)."""
    return -fake.mean()


def adaptive_factor(reconstruction_grad: Tensor, adversarial_grad: Tensor) -> Tensor:
    """lambda = |grad L_rec| / (|grad L_adv| + 1e-4) at the decoder's last layer, at most 1e4 (VQGAN, Eq. 7)."""
    return (reconstruction_grad.norm() / (adversarial_grad.norm() + 1e-4)).clamp(0, 1e4).detach()
