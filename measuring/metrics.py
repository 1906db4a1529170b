"""Full-reference scores of 8-bit pictures that need no trained network.

Conventions: a picture is a uint8 tensor (3, H, W), RGB, and the original always comes before the decoded one. PSNR is
over RGB, or over red; MS-SSIM over luma, or over RGB.
"""

import math

import torch
import torch.nn.functional as F

from models.losses import MS_SSIM_EXPONENTS, gaussian_window, similarity

MS_SSIM_MIN_SIDE = 161


def psnr(original: torch.Tensor, decoded: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over the RGB values of two pictures; inf if they are equal."""
    require_pair(original, decoded)
    error = (original.double() - decoded.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def psnr_red(original: torch.Tensor, decoded: torch.Tensor) -> float:
    """PSNR in dB of the red channel alone, which the published evaluation measures; blind to green and blue."""
    return psnr(*(picture[:1].expand(3, -1, -1) for picture in (original, decoded)))


def ms_ssim(original: torch.Tensor, decoded: torch.Tensor) -> float | None:
    """Multi-scale structural similarity of the luma of two pictures, 0..1, as pyiqa's default `ms_ssim`.

    Five scales, Gaussian window of 11 pixels and deviation 1.5, luma in whole grey values, negative contrast-structure
    terms cut to 0 at every pixel: the last is where pytorch-msssim differs. None if a side is under 161 pixels, where
    the window no longer fits the fifth scale.
    """
    require_pair(original, decoded)
    if min(original.shape[-2:]) < MS_SSIM_MIN_SIDE:
        return None
    x, y = (_luma(picture) / 255 for picture in (original, decoded))
    window, score = gaussian_window(x), 1.0
    for exponent in MS_SSIM_EXPONENTS[:-1]:
        score *= similarity(x, y, window)[1].relu().mean().item() ** exponent
        padding = (x.shape[2] % 2, x.shape[3] % 2)
        x, y = F.avg_pool2d(x, 2, padding=padding), F.avg_pool2d(y, 2, padding=padding)
    luminance, contrast = similarity(x, y, window)
    return score * (luminance * contrast.relu()).mean().item() ** MS_SSIM_EXPONENTS[-1]


def ms_ssim_rgb(original: torch.Tensor, decoded: torch.Tensor) -> float:
    """Multi-scale structural similarity of R, G and B, 0..1: their mean, by pytorch-msssim, in float32.

    What learned codecs mostly report. Negative terms are cut to 0 after the mean over a channel, not at every pixel,
    and nothing is rounded. Sides from 161 pixels, which `Evaluator` sees to.
    """
    require_pair(original, decoded)
    import pytorch_msssim

    return pytorch_msssim.ms_ssim(original[None].float(), decoded[None].float(), data_range=255).item()


def colour_shift(original: torch.Tensor, decoded: torch.Tensor) -> tuple[float, float, float]:
    """Mean of decoded minus original for R, G and B, in grey values: positive where decoding made it brighter."""
    require_pair(original, decoded)
    return tuple((decoded.double() - original.double()).mean(dim=(1, 2)).tolist())


def bpp(file_bytes: int, height: int, width: int) -> float:
    """Bits per pixel of a whole file of `file_bytes` bytes for a source picture of `height` x `width` pixels."""
    return 8 * file_bytes / (height * width)


def require_pair(original: torch.Tensor, decoded: torch.Tensor) -> None:
    """Raise ValueError unless both are uint8 (3, H, W), of one size."""
    for picture in (original, decoded):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise ValueError(f"expected a uint8 tensor (3, H, W), got {picture.dtype} {tuple(picture.shape)}")
    if original.shape != decoded.shape:
        raise ValueError(f"pictures of different size: {tuple(original.shape)} and {tuple(decoded.shape)}")


def _luma(picture: torch.Tensor) -> torch.Tensor:
    """BT.601 full-range luma, rounded to grey values 0..255, as float64 (1, 1, H, W)."""
    red, green, blue = picture.float() / 255
    # Near halves the rounding hangs on these float32 steps, in pyiqa's order; in flat, dark regions it matters.
    return ((red * 0.299 + green * 0.587 + blue * 0.114) * 255).round().double()[None, None]
