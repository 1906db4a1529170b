"""Every term of the losses on numbers computed by hand: values, signs, factors, and who is moved."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.losses import (
    adaptive_factor,
    border_loss,
    chroma_distortion,
    commitment,
    dct_energies,
    detail_energies,
    detail_loss,
    distortion,
    flat_loss,
    hinge_discriminator,
    hinge_generator,
    line_bins,
    lines_loss,
    ms_ssim_loss,
    peak_loss,
    ring_weights,
    spectrum_loss,
    weave_loss,
)


def pixels(*colours: list[float]) -> torch.Tensor:
    """Pixels of a row: 1 x 3 x 1 x W."""
    return torch.tensor(colours).t()[None, :, None]


def plain(*colour: float) -> torch.Tensor:
    """A picture of one colour, in [-1, 1]."""
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 176, 176)


def test_distortion():
    # errors 0.5, -1, 0 and 0, 0, 2: (0.25 + 1 + 4) / 6
    image = pixels([0.5, -1.0, 0.0], [0.0, 0.0, 1.0]).requires_grad_()
    loss = distortion(image, pixels([0.0, 0.0, 0.0], [0.0, 0.0, -1.0]))
    assert loss.item() == pytest.approx(0.875)
    loss.backward()  # 2 error / 6
    torch.testing.assert_close(image.grad, pixels([1 / 6, -1 / 3, 0.0], [0.0, 0.0, 2 / 3]))


def test_chroma_distortion():
    # error (0.3, 0, -0.6), mean -0.1: 0.4, 0.1, -0.5 are left, (0.16 + 0.01 + 0.25) / 3 = 0.14; the grey error counts 0
    image, target = pixels([0.3, 0.2, -0.6], [0.7, 0.8, 0.9]), pixels([0.0, 0.2, 0.0], [0.2, 0.3, 0.4])
    assert chroma_distortion(image, target).item() == pytest.approx(0.07)
    assert chroma_distortion(target, image).item() == pytest.approx(0.07)


def test_commitment_moves_the_encoder_alone():
    # ((1 - 0)^2 + (2 - 4)^2) / 2 = 2.5, gradient 2 (z - z_q) / 2
    z = torch.tensor([1.0, 2.0], requires_grad=True)
    z_q = torch.tensor([0.0, 4.0], requires_grad=True)
    loss = commitment(z, z_q)
    assert loss.item() == 2.5
    loss.backward()
    assert z.grad.tolist() == [1, -2] and z_q.grad is None


@pytest.mark.parametrize(
    ("image", "target", "expected"),
    [
        # 0.02 and 0.04 of the range: (0.0016 + 0.0001) / (0.0004 + 0.0016 + 0.0001) = 17/21
        ((-0.96,) * 3, (-0.92,) * 3, 0.027774),
        # a primary of one half against black: 0.0001 / (a^2 + 0.0001) with a = 0.1495, 0.2935 and 0.057
        ((0.0, -1.0, -1.0), (-1.0,) * 3, 0.514060),
        ((-1.0, 0.0, -1.0), (-1.0,) * 3, 0.593867),
        ((-1.0, -1.0, 0.0), (-1.0,) * 3, 0.373777),
    ],
)
def test_ms_ssim_of_plain_pictures(image, target, expected):
    """Without structure it is SSIM's luminance term ((2ab + C1) / (a^2 + b^2 + C1)) of the lumas a and b in [0, 1], with
    C1 = 0.01^2, to the exponent of the coarsest scale, 0.1333 (Wang et al. 2003).
    """
    assert ms_ssim_loss(plain(*image), plain(*target)).item() == pytest.approx(expected, rel=1e-4)


def test_ms_ssim_is_0_for_equal_pictures_and_falls_on_the_way_to_them():
    target, noise = torch.rand(2, 2, 3, 176, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1
    losses = [ms_ssim_loss(target + share * (noise - target), target).item() for share in (0, 0.1, 0.3, 1)]
    assert losses[0] == pytest.approx(0, abs=1e-6) and losses == sorted(losses) and 0.5 < losses[-1] < 1.01
    colour = torch.tensor([0.1, -0.1 * 0.299 / 0.587, 0.0]).view(3, 1, 1)  # of no luma
    assert ms_ssim_loss(target + colour, target).item() == pytest.approx(0, abs=5e-6)


# What repeats every 16 pixels ---------------------------------------------------------------------------------------

GREY = 2 / 255  # one grey value


def stripes(period: int, side: int = 128, amplitude: float = GREY) -> torch.Tensor:
    """A picture of columns that are an amplitude above and below 0 in turn."""
    high = (torch.arange(side) // (period // 2) % 2).float() * 2 - 1
    return (amplitude * high).expand(1, 3, side, side)


def test_weave_is_the_power_of_a_pattern_of_16_pixels_on_smooth_ground():
    ground = torch.zeros(1, 3, 128, 128)
    assert weave_loss(stripes(16), ground).item() == pytest.approx(GREY**2, rel=1e-5)
    assert weave_loss(stripes(8, amplitude=3 * GREY), ground).item() == pytest.approx(9 * GREY**2, rel=1e-5)
    assert weave_loss(stripes(16), stripes(16)).item() == 0  # the error, not the picture
    assert weave_loss(stripes(16).transpose(2, 3), ground).item() == pytest.approx(GREY**2, rel=1e-5)
    colour = stripes(16) * torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1)  # of no luma
    assert weave_loss(colour, ground).item() == pytest.approx(0, abs=1e-12)


def test_what_does_not_repeat_is_no_weave():
    ground = torch.zeros(1, 3, 128, 128)
    assert weave_loss(ground + 0.3, ground).item() == pytest.approx(0, abs=1e-12)  # a level
    assert weave_loss(stripes(32), ground).item() == pytest.approx(0, abs=1e-12)  # each cell is of one level
    checks = torch.cat([stripes(16)[..., :16], -stripes(16)[..., :16]], dim=3).repeat(1, 1, 1, 4)
    assert weave_loss(checks, ground).item() == 0  # less than nothing: half of the pairs and more are opposite
    grain = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0)).expand(1, 3, 256, 256)
    ground = torch.zeros(1, 3, 256, 256)
    assert weave_loss(GREY * grain, ground).item() / GREY**2 < 0.01
    both = weave_loss(GREY * grain + stripes(16, 256), ground).item() / GREY**2
    assert both == pytest.approx(1, abs=0.03)


def test_weave_counts_smooth_ground_alone():
    rough = torch.zeros(1, 3, 64, 192)  # blocks from 0, 32, 64, 96 and 128 on: the last two are smooth
    rough[..., :96] = stripes(64, 192)[..., :64, :96] * 20
    woven = stripes(16, 192)[..., :64, :]
    assert weave_loss(torch.cat([(rough + woven)[..., :96], rough[..., 96:]], dim=3), rough).item() == 0
    loss = weave_loss(torch.cat([rough[..., :96], (rough + woven)[..., 96:]], dim=3), rough).item()
    assert loss == pytest.approx(2 / 5 * GREY**2, rel=1e-5)
    for deviation, expected in ((7, GREY**2), (9, 0)):  # grey values, on either side of the bound
        original = stripes(64) * deviation
        assert weave_loss(original + stripes(16), original).item() == pytest.approx(expected, rel=1e-4)


# Lines of the error's spectrum ----------------------------------------------------------------------------------------


def gratings(powers: dict[int, float], side: int = 256, dim: int = 3) -> torch.Tensor:
    """An error picture, cosines along an axis with these powers by bin of 256: 1 x 3 x side x side."""
    place = torch.arange(side).double()  # rounding would stand out where nothing else is
    waves = torch.stack([power**0.5 * torch.cos(2 * torch.pi * at * place / side) for at, power in powers.items()])
    waves = waves.sum(0).expand(1, 3, side, side).clone()
    return waves if dim == 3 else waves.transpose(2, 3)


@pytest.mark.parametrize("dim", [2, 3])
def test_lines_by_hand(dim):
    """A line at 4/16 cycles per pixel, bin 64 of 256, four times as strong as each of the eight bins beside it: ln 4 of 16 lines."""
    beside = {at: 0.01 for n in range(2, 6) for at in (64 - n, 64 + n)}
    error = gratings(beside | {64: 0.04}, dim=dim)
    zero = torch.zeros_like(error)
    # Where there is no error both are 0, and the other axis has nothing but its mean: no line there.
    assert lines_loss(error, zero).item() == pytest.approx(math.log(4) / 16, rel=1e-3)
    assert lines_loss(error + 0.7, zero + 0.7).item() == pytest.approx(math.log(4) / 16, rel=1e-3)
    assert lines_loss(gratings(beside | {64: 0.005}, dim=dim), zero).item() == pytest.approx(0, abs=1e-6)
    quarter = gratings({at: power / 2 for at, power in (beside | {64: 0.04}).items()}, dim=dim)
    assert lines_loss(quarter, zero).item() == pytest.approx(math.log(4) / 16, rel=1e-3)  # of no unit
    grown = F.pad(error, (0, 5, 0, 5))  # sides are cut to multiples of 16
    assert lines_loss(grown, torch.zeros_like(grown)).item() == pytest.approx(math.log(4) / 16, rel=1e-3)


def test_lines_below_rounding_are_none():
    """A line four times its neighbours where these have 3, 1 and 1/3 times what rounding has: ln((4 q + 1) / (q + 1)).

    A cosine of power p has 256^2 p / 4 in its bin; rounding to 8 bits a variance of 1 / 12 of a grey value squared, 256 of
    them in every bin.
    """
    rounding = 256 * (2 / 255) ** 2 / 12
    for q in (3, 1, 1 / 3):
        beside = {at: 4 * q * rounding / 256**2 for n in range(2, 6) for at in (64 - n, 64 + n)}
        error = gratings(beside | {64: 16 * q * rounding / 256**2})
        expected = math.log((4 * q + 1) / (q + 1)) / 16
        assert lines_loss(error, torch.zeros_like(error)).item() == pytest.approx(expected, rel=1e-3)


def test_lines_of_colour_count_as_those_of_grey():
    """Red and blue against each other have no grey, and ln 4 of 16 lines as above; red alone has both."""
    beside = {at: 0.01 for n in range(2, 6) for at in (64 - n, 64 + n)}
    error = gratings(beside | {64: 0.04}) * torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1)
    assert lines_loss(error, torch.zeros_like(error)).item() == pytest.approx(math.log(4) / 16, rel=1e-3)
    error[:, 2] = 0
    assert lines_loss(error, torch.zeros_like(error)).item() == pytest.approx(2 * math.log(4) / 16, rel=1e-3)
    green = error.flip(1).roll(-1, 1)
    assert green[:, 1].any() and not green[:, ::2].any()
    assert lines_loss(green, torch.zeros_like(green)).item() == pytest.approx(math.log(4) / 16, rel=1e-3)


def test_a_line_does_not_hide_behind_another_picture():
    """A picture without lines, a hundred times as loud, halves the mean of two, and no more."""
    beside = {at: 0.01 for n in range(2, 6) for at in (64 - n, 64 + n)}
    quiet, loud = gratings(beside | {64: 0.04}), 10 * gratings(beside | {64: 0.01})
    error = torch.cat([quiet, loud])
    assert lines_loss(error, torch.zeros_like(error)).item() == pytest.approx(math.log(4) / 32, rel=1e-3)


def test_the_finest_line_has_neighbours_on_one_side():
    error = gratings(
        {128: 0.01} | {128 - n: 0.01 for n in range(2, 6)}
    )  # at 1/2 cycle a cosine is its own mirror: four times the power
    assert lines_loss(error, torch.zeros_like(error)).item() == pytest.approx(math.log(4) / 16, rel=1e-3)
    assert line_bins(256)[7] == (128, [126, 125, 124, 123]) and line_bins(192)[0] == (12, [10, 14, 9, 15, 8, 16, 7, 17])


def test_lines_push_the_line_alone():
    torch.manual_seed(0)
    error = (0.02 * torch.randn(2, 3, 256, 256) + gratings({32: 0.01})).requires_grad_()  # float64
    lines_loss(error, torch.zeros_like(error)).backward()
    spectrum = torch.fft.rfft(error.grad.mean((0, 1, 2))).abs().square()  # lines along y have no mean over the rows
    assert spectrum[32] > 100 * spectrum[[30, 29, 28, 27, 34, 35, 36, 37]].mean()
    assert (error.grad * gratings({32: 0.01})).sum() > 0  # a step of descent takes the line away


def test_peak_hears_a_corner_that_means_do_not():
    """One of 4,096 pixels is off by 0.1, in all channels: (0.1^8 / 4096)^(1/8) = 0.1 / 2^1.5, as a part of two pictures half.

    The mean of `flat_loss` is 0.1 / 4096 of it. Errors where the original has several colours are not counted.
    """
    target = torch.full((1, 3, 64, 64), -1.0)
    image = target.clone()
    image[..., 0, 0] += 0.1
    assert peak_loss(image, target).item() == pytest.approx(0.1 / 2**1.5, rel=1e-4)
    assert flat_loss(image, target).item() == pytest.approx(0.1 / 4096, rel=1e-4)
    two = peak_loss(torch.cat([image, target]), torch.cat([target, target])).item()
    assert two == pytest.approx((0.1 / 2**1.5 + 1e-3) / 2, rel=1e-4)  # 1e-3 is that of no error
    target[..., 40, 40], image[..., 40, 40] = 1.0, 0.0
    assert peak_loss(image, target).item() == pytest.approx(0.1 / 2**1.5, rel=1e-4)
    image.requires_grad_()
    peak_loss(image, target).backward()
    assert image.grad.nonzero().tolist() == [[0, channel, 0, 0] for channel in range(3)] and (image.grad >= 0).all()


def test_flat_counts_cells_of_one_colour_alone():
    """An error of 0.1 everywhere, signs mixed, in 2x3 cells: one of one colour, one that spans 2 grey values and one that
    spans 3 in blue alone, one with a step; the column at the right, of 8 pixels, is no cell. Two of six count: 0.2 / 6.
    """
    target = torch.rand(1, 3, 32, 56, generator=torch.Generator().manual_seed(0)) - 0.5
    target[..., :16, :16] = 0.25
    for left, levels in ((16, 2), (32, 3)):
        target[..., :16, left : left + 16] = -0.5
        target[:, 2, 5, left + 7] += levels / 127.5
    target[..., 16:, :8], target[..., 16:, 8:16] = -1.0, 1.0
    sign = torch.ones(32, 56)
    sign[::2] = -1
    assert flat_loss(target + 0.1 * sign, target).item() == pytest.approx(0.2 / 6, rel=1e-5)
    image = (target + 0.1 * sign).requires_grad_()
    flat_loss(image, target).backward()
    assert torch.equal(image.grad.sign()[..., :16, :32], sign[:16, :32].expand(1, 3, -1, -1))  # towards the original
    assert not image.grad[..., 32:].any() and not image.grad[..., 16:, :].any()


def test_border_is_the_outermost_8_pixels():
    """1/2 on the rim of 40x24 and 1 inside of it: 1/4, whatever its share of the pixels."""
    error = torch.full((2, 3, 40, 24), 0.5)
    error[..., 8:-8, 8:-8] = 1.0
    assert border_loss(error, torch.zeros_like(error)).item() == pytest.approx(0.25)
    error[..., 0, :], error[..., -1] = 0.0, 0.0  # of 960 - 24 * 8 pixels, 24 + 39 are 0
    assert border_loss(error, torch.zeros_like(error)).item() == pytest.approx(0.25 * (1 - 63 / 768))


def test_detail_is_the_energy_of_two_bands():
    """Of a checkerboard of v, 3x3 pixels have the mean v/9 with the middle's sign: 8/9 v is left. 7x7 have 1/49 of that v/9."""
    v, d = 0.5, 1 / 127.5
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    board = (v * (1 - 2.0 * ((rows + columns) % 2))).double().expand(1, 3, 40, 40)
    fine, coarse = (e[0, 0, 20, 20].item() for e in detail_energies(board))
    assert fine == pytest.approx((8 / 9 * v) ** 2 + d**2)
    assert coarse == pytest.approx((48 / 49 * v / 9) ** 2 + d**2)


def test_detail_loss_sees_amounts_and_no_waves():
    """Twice the amplitude is 4 times the energy, (ln 4)^2, as is half; the negative, a cast and a colour have as much of it."""
    torch.manual_seed(0)
    noise = 0.4 * torch.randn(1, 1, 64, 64, dtype=torch.float64).expand(1, 3, 64, 64)
    for other in (2 * noise, noise / 2):
        assert detail_loss(other, noise).item() == pytest.approx(math.log(4) ** 2, rel=0.02)
    colour = noise * torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64).view(1, 3, 1, 1)
    for other in (-noise, noise + 0.2, noise + colour):
        assert detail_loss(other, noise).item() == pytest.approx(0, abs=1e-12)
    assert detail_loss(noise + 0.1 * noise.flip(3), noise) > 1e-4


def test_hinge_of_the_discriminator():
    # max(0, 1 - (2, 0.5, -1)) = 0, 0.5, 2 with mean 5/6; max(0, 1 + (-2, 0, 1)) = 0, 1, 2 with mean 1; half of 11/6
    real = torch.tensor([2.0, 0.5, -1.0], requires_grad=True)
    fake = torch.tensor([-2.0, 0.0, 1.0], requires_grad=True)
    loss = hinge_discriminator(real, fake)
    assert loss.item() == pytest.approx(11 / 12)
    loss.backward()  # real scores rise, fake ones fall, unless they are right by the margin of 1
    assert real.grad.tolist() == pytest.approx([0, -1 / 6, -1 / 6])
    assert fake.grad.tolist() == pytest.approx([0, 1 / 6, 1 / 6])


def test_hinge_of_the_generator():
    fake = torch.tensor([-2.0, 0.0, 5.0], requires_grad=True)
    loss = hinge_generator(fake)
    assert loss.item() == -1
    loss.backward()
    assert fake.grad.tolist() == pytest.approx([-1 / 3] * 3)


def test_adaptive_weight():
    five = torch.tensor([3.0, 4.0], requires_grad=True)
    assert adaptive_factor(five, torch.tensor([6.0, 8.0])).item() == pytest.approx(5 / 10.0001, rel=1e-6)
    assert adaptive_factor(five, torch.tensor([3e-4, 4e-4])).item() == pytest.approx(5 / 6e-4, rel=1e-5)
    assert adaptive_factor(five, torch.zeros(2)).item() == 1e4  # 5e4, but for the limit
    assert not adaptive_factor(five, torch.ones(2)).requires_grad


# Spectrum -------------------------------------------------------------------------------------------------------------


def test_white_noise_has_its_variance_in_every_coefficient():
    """The DCT is orthonormal: noise of deviation 5 grey values has 25 in each, and one grey value squared beside it."""
    noise = 5 / 127.5 * torch.randn(4, 1, 512, 512, generator=torch.Generator().manual_seed(0))
    energies = dct_energies(noise)
    assert energies.shape == (4, 64, 125, 125)  # 127 places of 8 pixels, 4 apart, less one on either side
    torch.testing.assert_close(energies.mean((0, 2, 3)) * 127.5**2, torch.full((64,), 26.0), rtol=0.03, atol=0)


def test_rings_count_alike_whatever_they_hold():
    """Coefficients of 8x8 by distance from the mean, rounded: 4 at 2, as (2, 0) or (1, 2), 5 at 3, .. 12 from 8 on."""
    weights = ring_weights().view(8, 8)
    assert weights[0, 0] == weights[0, 1] == weights[1, 1] == 0
    assert weights[2, 0] == weights[1, 2] == pytest.approx(1 / 7 / 4)
    assert weights[0, 3] == weights[2, 2] == pytest.approx(1 / 7 / 5)
    assert weights[0, 7] == weights[5, 5] == pytest.approx(1 / 7 / 11)
    assert weights[7, 7] == weights[3, 7] == pytest.approx(1 / 7 / 12)
    assert weights.sum() == pytest.approx(1)


def test_a_cosine_is_in_the_coefficients_of_its_frequency_and_direction():
    """k / 16 cycles per pixel along x is row 0 of the DCT, column k most: windows of 8 pixels spread it along the row."""
    x = torch.arange(512, dtype=torch.float64)
    for k in range(1, 6):
        energies = dct_energies(torch.cos(2 * math.pi * k / 16 * x).expand(1, 1, 512, 512)).mean((0, 2, 3)).view(8, 8)
        assert energies[0].argmax() == k and energies[0].sum() > 0.99 * energies.sum()
    checker = 1 - 2.0 * ((x[:, None] + x) % 2)  # 8 / 16 both ways: the last coefficients, u, v = 5 and 7 most
    energies = dct_energies(checker[None, None]).mean((0, 2, 3)).view(8, 8)
    assert energies[[5, 5, 7, 7], [5, 7, 5, 7]].sum() > 0.8 * 64  # of 64 that 8x8 pixels of +1 and -1 have


def test_spectrum_by_hand():
    """Twice the contrast is four times the energy of every coefficient: (ln 4)^2, where one grey value is little beside it."""
    target = 0.2 * torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert spectrum_loss(2 * target, target).item() == pytest.approx(math.log(4) ** 2, rel=1e-2)
    assert spectrum_loss(target + 0.3, target).item() == pytest.approx(0, abs=1e-6)  # the mean is in no ring


def test_spectrum_tells_a_checkerboard_from_grain():
    """Both deviate by as much, most of it finer than 3x3 pixels: `detail` hears a seventh of what the spectrum does."""
    random = torch.Generator().manual_seed(0)
    grain = 0.1 * torch.randn(1, 1, 256, 256, generator=random).expand(1, 3, -1, -1)
    sign = 1 - 2.0 * ((torch.arange(256)[:, None] + torch.arange(256)) % 2)
    checker = (0.1 * sign).expand(1, 3, 256, 256)
    assert spectrum_loss(checker, grain) > 5 * detail_loss(checker, grain)


def test_spectrum_tells_directions_apart():
    """Stripes across for stripes down, at 5/16 cycles per pixel: as much energy in the ring, none of it where it belongs."""
    stripes = 0.1 * torch.cos(2 * math.pi * 5 / 16 * torch.arange(256)).expand(1, 3, 256, 256)
    moved = stripes.roll(3, 3)  # as much at the same frequency, out of phase
    turned = stripes.transpose(2, 3)
    assert spectrum_loss(moved, stripes).item() < 0.05 < 1 < spectrum_loss(turned, stripes).item()


def test_spectrum_sees_grey_alone():
    """What red gains and blue loses is no energy of grey."""
    generator = torch.Generator().manual_seed(0)
    target = 0.2 * torch.randn(2, 3, 64, 64, generator=generator)
    colour = 0.2 * torch.randn(2, 1, 64, 64, generator=generator) * torch.tensor([1.0, 0.0, -1.0])[:, None, None]
    assert spectrum_loss(target + colour, target).item() == pytest.approx(0, abs=1e-6)


def test_spectrum_compares_place_by_place():
    """Twice the contrast on the left and half of it on the right: (ln 4)^2 at either, where means of both would hide some."""
    target = 0.2 * torch.randn(1, 3, 64, 1024, generator=torch.Generator().manual_seed(0))
    share = torch.where(torch.arange(1024) < 512, 2.0, 0.5)
    assert spectrum_loss(share * target, target).item() == pytest.approx(math.log(4) ** 2, rel=0.03)


def test_spectrum_teaches_the_image():
    """(2 ln s)^2 of s times the contrast: 8 ln s / s more for each more of s."""
    target = 0.2 * torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    share = torch.tensor(2.0, requires_grad=True)
    spectrum_loss(share * target, target).backward()
    assert share.grad.item() == pytest.approx(4 * math.log(2), rel=1e-2)
