"""What a decoder adds that no picture has: periodic patterns, bad borders, a colour cast, flat areas that are not flat.

Pictures are uint8 tensors (3, H, W), RGB; the original comes before the decoded one.
"""

from collections.abc import Iterable

import torch

from measuring.metrics import require_pair

PERIOD = 16  # pixels of a latent position: what repeats with it shows at multiples of 1/16 cycles per pixel
BORDER = 4  # pixels
LEAST = 12 * PERIOD  # pixels of a spectrum whose lines have neighbours of their own
NEIGHBOURS = range(2, 6)  # bins of the spectrum on either side that a line is compared with


def error_spectrum(original: torch.Tensor, decoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Power of the luma error by horizontal and by vertical frequency, each averaged over the other.

    Returns:
        float64 (W' / 2 + 1,) and (H' / 2 + 1,), from 0 to 1/2 cycles per pixel; W' and H' are the sides cut to
        multiples of 16, so that a pattern of that period falls into single bins.
    """
    require_pair(original, decoded)
    error = (decoded.double() - original.double()).mean(0)
    height, width = (side // PERIOD * PERIOD for side in error.shape)
    error = error[:height, :width]
    return tuple(torch.fft.rfft(error, dim=d).abs().square().mean(1 - d) / error.shape[d] for d in (1, 0))


def strongest_line(spectrum: torch.Tensor) -> tuple[float, float]:
    """The multiple of 1/16 cycles per pixel at which a spectrum stands out most from its neighbours.

    Args:
        spectrum: (n / 2 + 1,) of `error_spectrum`, n a multiple of 16 from LEAST up.
    Returns:
        frequency in cycles per pixel, and its power over the mean power 2 to 5 bins away on either side.
    """
    length = 2 * (len(spectrum) - 1)
    if length < LEAST:
        raise ValueError(f"{length} pixels: a line needs {LEAST} to have neighbours of its own")
    ratios = {}
    for multiple in range(1, PERIOD // 2 + 1):
        at = multiple * length // PERIOD
        beside = [at + sign * n for n in NEIGHBOURS for sign in (-1, 1) if at + sign * n < len(spectrum)]
        ratios[multiple / PERIOD] = (spectrum[at] / spectrum[beside].mean().clamp(min=1e-12)).item()
    return max(ratios.items(), key=lambda line: line[1])


def lines(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, tuple[float, float]]:
    """The strongest line of the mean error spectrum of a set, along `x` and along `y`, as `strongest_line`.

    Pictures of several sizes are interpolated to none: only those of the commonest length along an axis count there. An
    axis where that is under LEAST has no line.
    """
    spectra: dict[str, dict[int, list[torch.Tensor]]] = {"x": {}, "y": {}}
    for pair in pairs:
        for axis, spectrum in zip("xy", error_spectrum(*pair), strict=True):
            spectra[axis].setdefault(len(spectrum), []).append(spectrum)
    commonest = {axis: max(by_length.values(), key=len) for axis, by_length in spectra.items()}
    long = {axis: alike for axis, alike in commonest.items() if 2 * (len(alike[0]) - 1) >= LEAST}
    return {axis: strongest_line(torch.stack(alike).mean(0)) for axis, alike in long.items()}


def border_errors(original: torch.Tensor, decoded: torch.Tensor) -> tuple[float, float]:
    """Mean squared error, in squared grey values, of the outer 4 pixels and of all others."""
    require_pair(original, decoded)
    squares = (decoded.double() - original.double()).square().mean(0)
    middle = torch.zeros_like(squares, dtype=torch.bool)
    middle[BORDER:-BORDER, BORDER:-BORDER] = True
    return squares[~middle].mean().item(), squares[middle].mean().item()
