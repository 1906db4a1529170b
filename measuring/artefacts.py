"""What a decoder adds that no picture has: periodic patterns, bad borders, a colour cast, flat areas that are not flat.

Pictures are uint8 tensors (3, H, W), RGB; the original comes before the decoded one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from measuring.metrics import require_pair
from models.bitstream import CELL as PERIOD  # what repeats with it shows at multiples of 1/16 cycles per pixel
from models.losses import GROUND, LEAST_LINES, SMOOTH, line_bins  # of Kodak, some 200 blocks are smooth

BORDER = 4  # pixels
ROUNDING = 1 / 12  # power of rounding to whole grey values: less than this is no picture


def error_spectrum(
    original: torch.Tensor, decoded: torch.Tensor, colour: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Power of the luma error by horizontal and by vertical frequency, each averaged over the other.

    Args:
        colour: of red less blue instead.
    Returns:
        float64 (W' / 2 + 1,) and (H' / 2 + 1,), from 0 to 1/2 cycles per pixel; W' and H' are the sides cut to
        multiples of 16, so that a pattern of that period falls into single bins.
    """
    require_pair(original, decoded)
    difference = decoded.double() - original.double()
    error = difference[0] - difference[2] if colour else difference.mean(0)
    height, width = (side // PERIOD * PERIOD for side in error.shape)
    error = error[:height, :width]
    return tuple(torch.fft.rfft(error, dim=d).abs().square().mean(1 - d) / error.shape[d] for d in (1, 0))


def strongest_line(spectrum: torch.Tensor) -> tuple[float, float]:
    """The multiple of 1/16 cycles per pixel at which a spectrum stands out most from its neighbours.

    Args:
        spectrum: (n / 2 + 1,) of `error_spectrum`, n a multiple of 16 from LEAST_LINES up.
    Returns:
        frequency in cycles per pixel, and its power over the mean power 2 to 5 bins away on either side.
    """
    length = 2 * (len(spectrum) - 1)
    if length < LEAST_LINES:
        raise ValueError(f"{length} pixels: a line needs {LEAST_LINES} to have neighbours of its own")
    ratios = {
        line / length: (spectrum[line] / spectrum[beside].mean().clamp(min=1e-12)).item()
        for line, beside in line_bins(length)
    }
    return max(ratios.items(), key=lambda line: line[1])


def lines(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], colour: bool = False) -> dict[str, tuple[float, float]]:
    """The strongest line of the mean error spectrum of a set, along `x` and along `y`, as `strongest_line`.

    `colour` as in `error_spectrum`.

    Pictures of several sizes are interpolated to none: only those of the commonest length along an axis count there. An
    axis where that is under LEAST_LINES has no line.
    """
    spectra: dict[str, dict[int, list[torch.Tensor]]] = {"x": {}, "y": {}}
    for pair in pairs:
        for axis, spectrum in zip("xy", error_spectrum(*pair, colour), strict=True):
            spectra[axis].setdefault(len(spectrum), []).append(spectrum)
    commonest = {axis: max(by_length.values(), key=len) for axis, by_length in spectra.items()}
    long = {axis: alike for axis, alike in commonest.items() if 2 * (len(alike[0]) - 1) >= LEAST_LINES}
    return {axis: strongest_line(torch.stack(alike).mean(0)) for axis, alike in long.items()}


def border_errors(original: torch.Tensor, decoded: torch.Tensor) -> tuple[float, float]:
    """Mean squared error, in squared grey values, of the outer 4 pixels and of all others."""
    require_pair(original, decoded)
    squares = (decoded.double() - original.double()).square().mean(0)
    middle = torch.zeros_like(squares, dtype=torch.bool)
    middle[BORDER:-BORDER, BORDER:-BORDER] = True
    return squares[~middle].mean().item(), squares[middle].mean().item()


# On smooth ground, where the eye finds what texture hides --------------------------------------------------------------


def smooth_blocks(original: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Luma of the blocks of 64x64 pixels in which the original's deviates by less than SMOOTH, of all these pictures.

    Returns:
        for each picture float64 (M, 64, 64), the same M blocks; they begin at multiples of 64.
    """
    for other in others:
        require_pair(original, other)
    luma = torch.stack([picture.double().mean(0) for picture in (original, *others)])
    rows, columns = (side // GROUND for side in luma.shape[1:])
    blocks = luma[:, : rows * GROUND, : columns * GROUND].unflatten(1, (rows, GROUND)).unflatten(3, (columns, GROUND))
    blocks = blocks.transpose(2, 3).flatten(1, 2)
    smooth = blocks[0].std((1, 2), correction=0) < SMOOTH
    return list(blocks[:, smooth])


@dataclass(frozen=True)
class Weave:
    """What repeats every 16 pixels on smooth ground.

    Attributes:
        rms: of all of it, in grey values; 0 where nothing stands out.
        ratio: power of its strongest line over that around it. down, across: the line's cycles per pixel.
    """

    rms: float
    ratio: float
    down: float
    across: float


def weave(errors: torch.Tensor) -> Weave:
    """The lines at multiples of 1/16 cycles per pixel, down and across, of the mean spectrum of blocks, (M, 64, 64)."""
    lines, around = _lines_and_around(_spectra(errors).mean(0))
    down, across = divmod((lines / around).argmax().item(), PERIOD)
    window = _window(errors.shape[-1])
    power = (lines - around).sum() * window.square().sum() / window.sum().square()
    return Weave(power.clamp(min=0).sqrt().item(), (lines / around).max().item(), *_frequencies(down, across))


@dataclass(frozen=True)
class Mesh:
    """What repeats every 16 pixels or a whole fraction of that in decoded pictures, and not in their originals.

    Attributes:
        ratio: power of the line that gained most over what is around it, over the same of the originals; 1: none did.
        down, across: its cycles per pixel.
    """

    ratio: float
    down: float
    across: float


def mesh(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], colour: bool = False) -> Mesh | None:
    """Lines of decoded pictures themselves, (original, decoded), at multiples of 1/16 cycles per pixel down and across.

    An error's lines hide behind detail that is missing, and a pattern of both axes behind one axis. Blocks are 64x64
    pixels of luma (`colour`: of red less blue), and each counts as much by its power from 2/16 on: a pattern on sky must
    not hide behind foliage. None where no picture has a block.
    """
    large = [pair for pair in pairs if min(pair[0].shape[1:]) >= GROUND]
    if not large:
        return None
    ratios = []
    for pictures in zip(*large, strict=True):
        lines, around = _lines_and_around(
            torch.stack([_even_spectrum(picture, colour) for picture in pictures]).mean(0)
        )
        ratios.append(lines / around)
    gained = ratios[1] / ratios[0]
    return Mesh(gained.max().item(), *_frequencies(*divmod(gained.argmax().item(), PERIOD)))


def _even_spectrum(picture: torch.Tensor, colour: bool) -> torch.Tensor:
    """Mean spectrum of a picture's blocks of 64x64 pixels, each of mean power 1 from 2/16 cycles per pixel down on."""
    values = picture.double()
    values = values[0] - values[2] if colour else values.mean(0)
    spectra = _spectra(values.unfold(0, GROUND, GROUND).unfold(1, GROUND, GROUND).flatten(0, 1))
    first = 2 * GROUND // PERIOD
    return (spectra / (spectra[:, first : 1 - first].mean((1, 2), keepdim=True) + ROUNDING)).mean(0)


def _window(side: int) -> torch.Tensor:
    window = torch.hann_window(side, dtype=torch.float64)
    return window[:, None] * window


def _spectra(blocks: torch.Tensor) -> torch.Tensor:
    """Power by frequency down and across, (M, n, n) -> (M, n, n). Hann windows keep lines and surroundings apart."""
    window = _window(blocks.shape[-1])
    centred = blocks - blocks.mean((1, 2), keepdim=True)
    return torch.fft.fft2(centred * window).abs().square() / window.square().sum()


def _lines_and_around(spectrum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A spectrum, (n, n), at multiples of 1/16 cycles per pixel, and around them: (16, 16) each, alike at the mean.

    Around is the geometric mean over the eight places 2 bins away, as the spectra of photographs fall with a power of the frequency.
    """
    n = len(spectrum)
    ring = [(i, j) for i in (-2, 0, 2) for j in (-2, 0, 2) if i or j]
    around = torch.stack([spectrum.roll(shift, (0, 1)) for shift in ring]).clamp(min=1e-12).log().mean(0).exp()
    lines, around = (v[:: n // PERIOD, :: n // PERIOD].clamp(min=1e-12) for v in (spectrum, around))
    lines[0, 0] = around[0, 0]  # the mean is no pattern
    return lines, around


def _frequencies(*lines: int) -> tuple[float, ...]:
    """Cycles per pixel of multiples of 1/16; a negative frequency is its positive one."""
    return tuple(min(line, PERIOD - line) / PERIOD for line in lines)


def fine_detail(blocks: torch.Tensor) -> float:
    """RMS of blocks, (M, 64, 64), after their moving mean over 16x16 pixels is taken away, in grey values.

    What repeats every 16 pixels, or a whole fraction of that, passes unchanged; grain does nearly.
    """
    mean = F.avg_pool2d(blocks[:, None], PERIOD, 1)[:, 0]
    start = PERIOD // 2
    inner = blocks[:, start : start + mean.shape[1], start : start + mean.shape[2]]
    return (inner - mean).square().mean().sqrt().item()
