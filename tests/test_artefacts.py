"""Artefacts on errors made by hand: a known pattern, a known border."""

import math

import pytest
import torch

from measuring.artefacts import border_errors, error_spectrum, lines, strongest_line

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
