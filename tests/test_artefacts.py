"""Artefacts on errors made by hand: a known pattern, a known border."""

import math

import pytest
import torch

from experiments.artefacts import MEANING, found
from measuring.artefacts import (
    Mesh,
    _lines_and_around,
    border_errors,
    error_spectrum,
    fine_detail,
    lines,
    mesh,
    smooth_blocks,
    strongest_line,
    weave,
)
from utils.images import write_image

GENERATOR = torch.Generator().manual_seed(0)


def noisy(height: int = 256, width: int = 384, pattern: torch.Tensor | float = 0.0) -> tuple:
    """A grey picture and itself with white noise of deviation 8 and a pattern, clear of 0 and 255."""
    original = torch.full((3, height, width), 128, dtype=torch.uint8)
    noise = 8 * torch.randn(1, height, width, generator=GENERATOR)
    return original, (original + noise + pattern).round().clamp(0, 255).to(torch.uint8)


def test_the_spectrum_of_a_cosine_is_one_line_of_known_power():
    """A cos(2 pi x / 16) over n pixels: |F| = A n / 2 at its bin, power / n = A^2 n / 4. Whole grey values make 4 cos to
    4 4 3 2 0 -2 ..., whose A is (2 x 4 + 4 (0.924 x 4 + 0.707 x 3 + 0.383 x 2)) / 8 = 4.291."""
    wave = (4 * torch.cos(2 * math.pi * torch.arange(384) / 16)).round()
    original = torch.full((3, 256, 384), 128, dtype=torch.uint8)
    x, y = error_spectrum(original, (original + wave).to(torch.uint8))
    assert len(x) == 193 and len(y) == 129
    assert x.argmax() == 384 // 16 and x.max().item() == pytest.approx(4.291**2 * 384 / 4, rel=1e-3)
    assert (x > 1e-6).nonzero().flatten().tolist() == [24, 72, 120, 168]  # rounding leaves odd multiples alone
    assert y[1:].max() < 1e-9


def test_white_noise_has_no_line_and_a_weave_has_one():
    """Rows +2, +2, -2, -2: |F|^2 / n = 2 x 256 at 1/4 cycle per pixel, over noise of 8^2."""
    plain = lines(noisy() for _ in range(6))
    assert all(ratio < 1.5 for _, ratio in plain.values())
    weave = 2.0 * (torch.arange(256) % 4 < 2).double()[:, None].mul(2).sub(1)  # rows, 1/4 cycle per pixel
    found = lines(noisy(pattern=weave) for _ in range(6))
    assert found["x"][1] < 1.5 and found["y"] == (0.25, pytest.approx(1 + 512 / 64, rel=0.1))


def test_a_weave_of_colour_is_no_line_of_grey():
    """Red +1, -1 by columns and blue against it, over noise that both share: of red less blue |F|^2 / n = 2^2 x 384 at 1/2
    cycle per pixel, and nothing elsewhere.
    """
    sign = 1 - 2.0 * (torch.arange(384) % 2)
    pattern = torch.stack([sign, 0 * sign, -sign])[:, None]
    pairs = [noisy(pattern=pattern) for _ in range(6)]
    assert lines(pairs)["x"][1] < 1.5
    frequency, ratio = lines(pairs, colour=True)["x"]
    assert frequency == 0.5 and ratio > 1e9 and lines(pairs, colour=True)["y"][1] < 1.5
    x, _ = error_spectrum(*pairs[0], colour=True)
    assert x[-1].item() == pytest.approx(4 * 384) and x[:-1].max() < 1e-9


def test_the_table_tells_lines_of_colour_from_lines_of_grey(tmp_path):
    """Red up and blue down every fourth column: the columns of colour have it, 1/4 cycles per pixel, those of grey do not."""
    original = torch.randint(60, 200, (3, 192, 256), dtype=torch.uint8)
    wave = (6 * torch.cos(torch.arange(256) * math.pi / 2)).round().int()
    red_up = torch.stack([wave, 0 * wave, -wave])[:, None] + torch.randint(-3, 4, original.shape)
    write_image(tmp_path / "a.png", (original.int() + red_up).clamp(0, 255).byte())
    row = found({"a.png": original}, tmp_path)
    assert row["colour line along x, cycles per pixel"] == 0.25 and row["colour line along x"] > 50
    assert row["line along x"] < 5 and row["colour line along y"] < 5
    assert row["mesh"] < 1.5 < 4 < row["colour mesh"] and row["colour mesh, cycles per pixel"] == "0 down, 0.25 across"
    assert {"mesh", "colour mesh"} <= set(MEANING)


def test_a_mesh_that_missing_detail_hides_from_the_error_is_told(tmp_path):
    """A decoder loses noise of deviation 24 wholly, and paints checks of +1 and -1, 1/4 cycles per pixel down and across,
    over what is left, of 4. They have a quarter of their power in each of four lines: 1 + (32^2 / 24)^2 / 4 / 4^2. In the
    error, along an axis, it is 1 + 384 / 2 / 24^2.
    """
    stripes = (torch.arange(384) % 4 < 2).double().mul(2).sub(1)
    checks = stripes[:256, None] * stripes
    pictures = {}
    for i in range(6):
        kept, lost = (torch.randn(1, 256, 384, generator=GENERATOR) * deviation for deviation in (4, 24))
        pictures[f"{i}.png"] = (128 + kept + lost).round().clamp(0, 255).byte().expand(3, -1, -1)
        write_image(tmp_path / f"{i}.png", (128 + kept + checks).round().clamp(0, 255).byte().expand(3, -1, -1))
    row = found(pictures, tmp_path)
    assert row["mesh"] == pytest.approx(29.4, rel=0.15) and row["mesh, cycles per pixel"] == "0.25 down, 0.25 across"
    assert row["line along x"] == pytest.approx(1.33, rel=0.1) and row["line along y"] < 1.4


def test_what_the_originals_have_is_no_mesh():
    """Checks of both, and a picture that lost all its noise but not them: of as much power over what is around them."""
    x = torch.arange(128)
    checks = 20 * (1 - 2 * ((x[:, None] + x) % 2))
    pairs = []
    for _ in range(8):
        original = (128 + checks + 4 * torch.randn(3, 128, 128, generator=GENERATOR)).round().byte()
        pairs.append((original, original.clone()))
    assert mesh(pairs) == Mesh(1.0, 0.0, 0.0)
    stained = [(a, (b.int() + torch.tensor([6, 0, -6])[:, None, None] * (x % 2)).byte()) for a, b in pairs]
    assert mesh(stained).ratio < 1.2
    assert mesh([(a[:, :60], b[:, :60]) for a, b in pairs]) is None  # no block of 64x64
    assert mesh([(a[..., :60], b[..., :60]) for a, b in pairs]) is None
    assert mesh(stained, colour=True).ratio > 20 and mesh(stained, colour=True).across == 0.5


def test_a_mesh_on_sky_does_not_hide_behind_foliage():
    """Noise of deviation 4 on the left and 30 on the right, and on the left a checker of +1 and -1: (32^2 / 24)^2 of power,
    over 4^2 + 1 that its blocks have, over 1 of the right and 16/17 of noise around it. As they are, it would be
    1 + 1820 / (16 + 900). A slow wave of 20, as a sky has one, counts for nothing.
    """
    x = torch.arange(1024)
    left = x < 512
    noise = torch.where(left, 4.0, 30.0) * torch.randn(1, 1024, 1024, generator=torch.Generator().manual_seed(0))
    ground = 128 + noise + left * 20 * torch.cos(2 * math.pi * x / 64)[:, None]
    checker = left * (1 - 2 * ((x[:, None] + x) % 2))
    original, decoded = (v.round().clamp(0, 255).byte().expand(3, -1, -1) for v in (ground, ground + checker))
    found = mesh([(original, decoded)])
    assert found.ratio == pytest.approx(1 + 1820 / 17 / (1 + 16 / 17), rel=0.25)
    assert (found.down, found.across) == (0.5, 0.5)


def grain(side: int) -> torch.Tensor:
    """Noise of deviation 4 around 128, in whole grey values: 3 x side x side."""
    return (128 + 4 * torch.randn(3, side, side, generator=torch.Generator().manual_seed(0))).round()


def test_a_flat_picture_is_no_mesh_and_hides_none():
    """A flat block has no power to be divided by."""
    flat, noisy = torch.full((3, 64, 64), 128, dtype=torch.uint8), grain(64).byte()
    assert mesh([(flat, flat)]) == mesh([(flat, flat), (noisy, noisy)]) == Mesh(1.0, 0.0, 0.0)
    assert math.isfinite(mesh([(flat, noisy)]).ratio)


def test_around_is_the_middle_of_a_spectrum_that_falls_by_a_power():
    """e^-0.1(i + j) is the geometric mean of what lies 2 to either side of it; what wraps around is left out."""
    falling = torch.exp(-0.1 * (torch.arange(64)[:, None] + torch.arange(64)).double())
    lines, around = _lines_and_around(falling)
    torch.testing.assert_close(around[1:-1, 1:-1], lines[1:-1, 1:-1])


def test_a_slow_wave_is_no_mesh():
    """One period in a block, which the window spreads to its mean."""
    slow = (4 * torch.cos(2 * math.pi * torch.arange(256) / 64)).round()
    assert mesh([(grain(256).byte(), (grain(256) + slow).byte())]).ratio < 2


def test_green_is_neither_red_nor_blue():
    green = torch.tensor([0, 6, 0])[:, None, None] * (torch.arange(256) % 2)
    assert mesh([(grain(256).byte(), (grain(256) + green).byte())], colour=True).ratio == 1


def test_a_line_is_told_by_its_ratio_to_bins_that_are_not_next_to_it():
    spectrum = torch.ones(193)
    spectrum[24], spectrum[23], spectrum[25] = 3.0, 9.0, 9.0
    assert strongest_line(spectrum) == (1 / 16, 3.0)
    with pytest.raises(ValueError, match="176 pixels"):
        strongest_line(torch.ones(89))


def test_pictures_of_another_length_do_not_blur_a_line():
    found = lines([noisy(), noisy(), noisy(height=304, width=208)])
    assert set(found) == {"x", "y"} and all(math.isfinite(ratio) for _, ratio in found.values())


def test_the_border_is_the_outer_four_pixels():
    original = torch.zeros(3, 20, 30, dtype=torch.uint8)
    decoded = torch.full_like(original, 6)
    decoded[:, 4:-4, 4:-4] = 2
    assert border_errors(original, decoded) == (36.0, 4.0)


# On smooth ground -----------------------------------------------------------------------------------------------------

ROWS = torch.arange(64)[:, None].double()
COLUMNS = torch.arange(64)[None].double()


def noise(count: int, deviation: float) -> torch.Tensor:
    return deviation * torch.randn(count, 64, 64, generator=GENERATOR, dtype=torch.float64)


def test_a_grating_is_its_own_weave():
    """A cos of amplitude 3 has an RMS of 3 / sqrt 2, over 16 pixels or a fraction; of two gratings squares add up."""
    one = 3 * torch.cos(2 * math.pi * COLUMNS / 4).expand(40, 64, 64)
    found = weave(one + noise(40, 0.1))
    assert found.rms == pytest.approx(3 / math.sqrt(2), rel=1e-3) and (found.down, found.across) == (0, 1 / 4)
    both = one + 4 * torch.cos(2 * math.pi * (3 * ROWS - COLUMNS) / 16 + 1)
    found = weave(both + noise(40, 0.1))
    assert found.rms == pytest.approx(5 / math.sqrt(2), rel=1e-3) and (found.down, found.across) == (3 / 16, 1 / 16)


def test_a_checker_of_single_pixels_is_a_weave_of_its_amplitude():
    """+2 and -2: all power at 1/2 down and 1/2 across, which has no second bin: its RMS is 2. The line's power over white
    noise of deviation 4: 2^2 x (sum of w)^2 / sum of w^2 / 4^2; Hann windows of 64 have 32^2 / 24 a side."""
    checker = 2 * (1 - 2 * ((ROWS + COLUMNS) % 2)).expand(400, 64, 64)
    found = weave(checker + noise(400, 4.0))
    assert (found.down, found.across) == (1 / 2, 1 / 2)
    assert found.rms == pytest.approx(2, rel=0.02)
    assert found.ratio == pytest.approx(1 + 4 * (32**2 / 24) ** 2 / 16, rel=0.1)


def test_noise_and_what_repeats_with_another_period_are_no_weave():
    found = weave(noise(200, 4.0))
    assert found.rms < 0.2 and found.ratio < 1.4
    other = 6 * torch.cos(2 * math.pi * 6 * COLUMNS / 64).expand(40, 64, 64)  # midway between two lines
    assert weave(other + noise(40, 0.5)).rms < 0.2
    ramp = 0.2 * COLUMNS + 0.1 * ROWS
    assert weave(ramp.expand(9, 64, 64) + noise(9, 0.5)).rms < 0.3


def test_fine_detail_passes_what_repeats_and_drops_what_is_slow():
    grating = 3 * torch.cos(2 * math.pi * COLUMNS / 16).expand(2, 64, 64)
    assert fine_detail(grating + 100) == pytest.approx(3 / math.sqrt(2), rel=0.02)  # 49 columns are not whole periods
    checker = 2 * (1 - 2 * ((ROWS + COLUMNS) % 2)).expand(1, 64, 64)
    assert fine_detail(checker) == pytest.approx(2)
    assert fine_detail(0.1 * COLUMNS.expand(1, 64, 64)) == pytest.approx(0.05)  # the mean lies half a pixel beside
    assert fine_detail(noise(9, 4.0)) == pytest.approx(4, rel=0.02)


def test_smooth_ground_is_where_the_original_hardly_deviates():
    """Four blocks: flat; deviating by 7, and by 9; flat in the original alone."""
    half = torch.where(COLUMNS % 2 == 0, 1.0, -1.0).expand(64, 64)
    original = torch.full((3, 70, 4 * 64 + 5), 128.0)
    for block, deviation in enumerate((0, 7, 9, 0)):
        original[:, :64, 64 * block : 64 * block + 64] += deviation * half
    decoded = original.clone()
    decoded[:, :, 3 * 64 :] += 20 * torch.where(torch.arange(69) % 2 == 0, 1.0, -1.0)
    original, decoded = (picture.to(torch.uint8) for picture in (original, decoded))
    ours, theirs = smooth_blocks(original, decoded)
    assert len(ours) == len(theirs) == 3
    assert ours.std((1, 2), correction=0).tolist() == pytest.approx([0, 7, 0])
    assert theirs.std((1, 2), correction=0).tolist() == pytest.approx([0, 7, 20])
    assert all(len(blocks) == 0 for blocks in smooth_blocks(original[:, :60]))
