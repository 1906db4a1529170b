"""The terms that training minimises: distortion, perceptual, commitment and adversarial terms.

Pictures are N x 3 x H x W in [-1, 1]; every term is a scalar, averaged over the batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bitstream import CELL

# BT.601 luma of RGB in [0, 1]
LUMA = (0.299, 0.587, 0.114)
MS_SSIM_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
GROUND = 64  # side of a block of smooth ground, in pixels
SMOOTH = 8.0  # grey values: the largest deviation of the original's luma inside one
LEAST_LINES = 12 * CELL  # pixels of a spectrum whose lines have neighbours of their own
NEIGHBOURS = range(2, 6)  # bins of the spectrum on either side that a line is compared with
RIM = 8  # pixels from the outer edge that count as border
BANDS = (3, 7)  # pixels: sides of the squares whose means part grey into bands of detail
AROUND = 9  # side of the square that energy is a mean over, in pixels
LEAST_DETAIL = 1 / 127.5  # a deviation of one grey value, below which detail is not told from none
RING_SIDE = 8  # pixels: side of the DCT
RINGS = range(2, 9)  # of frequencies, in 1/16 cycles per pixel; the last has all beyond
FLAT = 2.0  # grey values: the widest range of the original inside a cell of one colour
ROUNDING = (1 / 127.5) ** 2 / 12  # variance of the error of rounding to 8 bits
TINY = 1e-12  # of a power: no error is exactly 0 there


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
    """1 - MS-SSIM of the luma (Wang, Simoncelli and Bovik 2003): a perceptual term that needs no weights. Sides from 161 pixels.

        MS-SSIM = SSIM(X_5, Y_5)^w_5 prod over j < 5 of CS(X_j, Y_j)^w_j,    X_(j+1) = X_j averaged over 2x2 pixels

    Windows are Gaussian, 11 pixels, without padding; negative terms are cut to 0 after the mean over a picture. The same numbers as
    pytorch-msssim's, which takes windows and exponents from the host at every call: no CUDA graph can be recorded of that.
    """
    red, green, blue = LUMA
    x, y = (
        (v[:, :1] * red + v[:, 1:2] * green + v[:, 2:] * blue + 1) / 2 for v in (image, target)
    )  # N 1 H W in [0, 1]
    window = gaussian_window(x)
    value = 1.0
    for scale, exponent in enumerate(MS_SSIM_EXPONENTS):
        if scale:
            x, y = (F.avg_pool2d(v, 2, padding=[side % 2 for side in v.shape[2:]]) for v in (x, y))
        luminance, contrast = similarity(x, y, window)
        last = scale == len(MS_SSIM_EXPONENTS) - 1
        terms = (luminance * contrast if last else contrast).mean((1, 2, 3))
        value = value * terms.clamp(min=TINY) ** exponent  # at 0 its slope is infinite
    return 1 - value.mean()


def gaussian_window(like: Tensor) -> Tensor:
    """SSIM's: deviation 1.5 over 11 pixels, sum 1; (11,), of the precision and on the device of another tensor."""
    place = torch.arange(11, device=like.device, dtype=like.dtype) - 5
    window = torch.exp(-place.square() / (2 * 1.5**2))
    return window / window.sum()


def similarity(x: Tensor, y: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM's terms of luminance, and of contrast and structure: N 1 H W in [0, 1] -> N 1 H-10 W-10 each, negative ones uncut."""

    def local(v: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(v, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_x, mean_y = local(x), local(y)
    variance_x, variance_y = local(x * x) - mean_x.square(), local(y * y) - mean_y.square()
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance, (2 * (local(x * y) - mean_x * mean_y) + c2) / (variance_x + variance_y + c2)


def weave_loss(image: Tensor, target: Tensor) -> Tensor:
    """Power of what repeats every 16 pixels in the luma error of smooth ground, where the eye finds it.

        loss = max(0, mean over blocks b of s_b mean over pairs of their n = 16 cells, i != j, of <e_i, e_j>)
             = max(0, mean over blocks b of s_b (n |mean_i e_i|^2 - mean_i |e_i|^2) / (n - 1))

    e_i is the error in a cell of 16x16 pixels less its mean, |.|^2 and <., .> are means over pixels. What cells share is
    counted whole, grain of their own not at all: its products are 0 on average. Blocks are 64x64 pixels, 32 apart; s_b is 1
    where the original is smooth, its luma (the mean of RGB) deviating by less than 8 grey values, and 0 elsewhere.
    """
    n, step = (GROUND // CELL) ** 2, GROUND // 2
    luma, reference = (v.mean(1).unfold(1, GROUND, step).unfold(2, GROUND, step) for v in (image, target))
    smooth = (reference.std((3, 4), correction=0) < SMOOTH / 127.5).to(luma)  # N rows columns, of blocks
    cells = (luma - reference).unflatten(4, (-1, CELL)).unflatten(3, (-1, CELL))  # by row, pixel, column and pixel
    e = cells - cells.mean((4, 6), keepdim=True)
    shared, own = e.mean((3, 5)).square().mean((3, 4)), e.square().mean((3, 4, 5, 6))
    power = (n * shared - own) / (n - 1)
    return (smooth * power).mean().relu()


def lines_loss(image: Tensor, target: Tensor) -> Tensor:
    """How far the error's power at multiples of 1/16 cycles per pixel stands out from its neighbours, in grey and in colour.

        loss = sum over grey and colour, mean over k = 1 .. 8 and both axes of max(0, ln(P(k/16) / mean_b P(k/16 + b)))

    P is the power of the error (of the mean of RGB, and of red less blue) by frequency along one axis, a mean over the other,
    and that of rounding to 8 bits: lines of a flat picture that it hides must not outweigh all others. Picture by picture:
    a mesh on one of them must not hide in the spectrum of a louder one. b are 2 to 5 bins on either side,
    inside the spectrum. Only the line has a gradient: it must not hide among louder neighbours, either. Sides from 192 pixels,
    cut to multiples of 16. A pixel shuffle makes such lines.
    """
    height, width = (side // CELL * CELL for side in image.shape[2:])
    error = (image - target)[..., :height, :width]
    return _excess(error.mean(1)) + _excess(error[:, 0] - error[:, 2])


def _excess(error: Tensor) -> Tensor:
    """`lines_loss` of one signal, N x H x W."""
    excess = []
    for axis, length in ((2, error.shape[2]), (1, error.shape[1])):
        power = torch.view_as_real(torch.fft.rfft(error, dim=axis)).square().sum(-1).mean(3 - axis)  # N bins
        power = power + length * ROUNDING
        for line, beside in line_bins(length):
            around = torch.stack([power[:, at] for at in beside]).mean(0).detach()
            excess.append((power[:, line].log() - around.log()).relu())
    return torch.stack(excess).mean()


def flat_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean over pixels and channels of s |e|, where s is 1 in cells of 16x16 pixels that have one colour, 0 elsewhere.

    e = X^ - X. A cell has one colour if no channel of the original spans more than 2 grey values in it. Grain on a black,
    white or blank ground is seen at once, and its squared error is too small to matter beside that of photographs; sides
    from 16 pixels, cut to multiples of it.
    """
    flat, error = _flat_errors(image, target)
    return (flat[:, None] * error.abs().mean((4, 5))).mean()


def peak_loss(image: Tensor, target: Tensor) -> Tensor:
    """What errors of `flat_loss` come to where they are largest: M_8 of each picture, and their mean.

        M_8 = (mean_p s e^8)^(1/8)

    over the picture's pixels and channels, and near the largest |e| of them. A corner of a black picture has a few pixels
    of many thousands, and no mean hears them.
    """
    flat, error = _flat_errors(image, target)
    powers = (flat[:, None] * error.pow(8).mean((4, 5))).mean((1, 2, 3))  # N
    return (powers + TINY**2).pow(1 / 8).mean()


def _flat_errors(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """s, N x h x w, and e, N x 3 x h x w x 16 x 16, of `flat_loss`."""
    cells, error = (v.unfold(2, CELL, CELL).unfold(3, CELL, CELL) for v in (target, image - target))
    spans = cells.amax((4, 5)) - cells.amin((4, 5))
    return (spans.amax(1) <= FLAT / 127.5).to(error), error


def detail_loss(image: Tensor, target: Tensor) -> Tensor:
    """Squared difference of the logarithms of local energies of detail, wherever its waves lie: a mean over two bands and pixels.

        loss = mean_b mean_p (ln(e_b(X^) + d^2) - ln(e_b(X) + d^2))^2,    e_b = the mean of b^2 over 9x9 pixels

    The bands are g - m_3 g and m_3 g - m_7 m_3 g: what 3x3 pixels average away of the grey g, the mean of RGB, and what 7x7
    do of the rest. d is one grey value. Distances to the original are least for too little detail where its waves cannot be
    known; this one is least for as much as there was.
    """
    ours, theirs = (detail_energies(v.mean(1, keepdim=True)) for v in (image, target))
    return torch.stack([(a.log() - b.log()).square().mean() for a, b in zip(ours, theirs, strict=True)]).mean()


def spectrum_loss(image: Tensor, target: Tensor) -> Tensor:
    """Squared difference of the logarithms of local energies of grey, frequency by frequency: a mean over rings and places.

        loss = mean_r mean_{|(u, v)| in r} mean_p (ln(e_uv(X^) + d^2) - ln(e_uv(X) + d^2))^2,    e_uv = mean of c_uv^2

    c_uv are coefficients of an orthonormal DCT of 8x8 pixels, one every 4 pixels; e_uv is a mean over 3x3 of them. The
    rings are r = 2 .. 7, of r / 16 cycles per pixel, and all beyond: each counts as much. d is one grey value, which white
    noise of that deviation has in every coefficient. `detail_loss` takes a checkerboard for grain; this one tells them
    apart, and a pattern of one direction from one of all.
    """
    ours, theirs = (dct_energies(v.mean(1, keepdim=True)) for v in (image, target))
    return ((ours.log() - theirs.log()).square().mean((0, 2, 3)) * ring_weights().to(ours)).sum()


def dct_energies(grey: Tensor) -> Tensor:
    """e_uv + d^2 of `spectrum_loss`, by row of u: N x 1 x H x W -> N x 64 x h x w."""
    place = torch.arange(RING_SIDE, dtype=torch.float64)
    basis = torch.cos(math.pi / RING_SIDE * (place + 0.5) * place[:, None]) * math.sqrt(2 / RING_SIDE)
    basis[0] /= math.sqrt(2)
    kernels = torch.einsum("uy,vx->uvyx", basis, basis).flatten(0, 1)[:, None].to(grey)
    return F.avg_pool2d(F.conv2d(grey, kernels, stride=RING_SIDE // 2).square(), 3, stride=1) + LEAST_DETAIL**2


def ring_weights() -> Tensor:
    """What each coefficient counts in `spectrum_loss`: (64,), 1 in all, as much for each ring, and 0 below them."""
    place = torch.arange(RING_SIDE)
    radius = torch.hypot(place[:, None].double(), place.double()).round().clamp(max=RINGS[-1]).flatten()
    return torch.stack([(radius == r) / (radius == r).sum() for r in RINGS]).mean(0)


def detail_energies(grey: Tensor) -> list[Tensor]:
    """e_b + d^2 of `detail_loss`, fine first: N x 1 x H x W -> as many each."""
    found = []
    for side in BANDS:
        coarser = _mean_around(grey, side)
        found.append(_mean_around((grey - coarser).square(), AROUND) + LEAST_DETAIL**2)
        grey = coarser
    return found


def _mean_around(x: Tensor, side: int) -> Tensor:
    """Mean over side x side positions around each, those that there are."""
    return F.avg_pool2d(x, side, stride=1, padding=side // 2, count_include_pad=False)


def border_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the outermost 8 pixels on all sides, which windows without padding (MS-SSIM) hardly see."""
    squared = (image - target).square()
    inside = squared[..., RIM:-RIM, RIM:-RIM]
    return (squared.sum() - inside.sum()) / (squared.numel() - inside.numel())


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

    def __init__(self, width: int = 64):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        stack: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for a, b, stride in zip(widths, widths[1:], (2, 2, 1), strict=False):
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
