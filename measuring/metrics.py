"""Full-reference scores of 8-bit pictures, and where the weights of the learned ones lie.

Conventions: a picture is a uint8 tensor (3, H, W), RGB, and the original always comes before the decoded one. PSNR is
over RGB, MS-SSIM over luma. `psnr`, `ms_ssim`, `colour_shift` and `bpp` need torch alone; pyiqa, which takes seconds to
import, is loaded by `score_with_pyiqa` only.
"""

import contextlib
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from utils.download import fetch
from utils.errors import DiffoError
from utils.precision import full_precision

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_MIN_SIDE = 161


def psnr(original: torch.Tensor, decoded: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all RGB levels of two pictures; inf if they are equal."""
    _check_pair(original, decoded)
    error = (original.double() - decoded.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ms_ssim(original: torch.Tensor, decoded: torch.Tensor) -> float | None:
    """Multi-scale structural similarity of the luma of two pictures, 0..1, as pyiqa's default `ms_ssim`.

    Five scales, Gaussian window of 11 pixels and deviation 1.5, luma rounded to levels, negative contrast-structure
    terms cut to 0 at every pixel: the last is where pytorch-msssim differs. None if a side is under 161 pixels, where
    the window no longer fits the fifth scale.
    """
    _check_pair(original, decoded)
    if min(original.shape[-2:]) < MS_SSIM_MIN_SIDE:
        return None
    x, y = _luma(original), _luma(decoded)
    score = 1.0
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        luminance, contrast = _ssim_terms(x, y)
        last = scale == len(MS_SSIM_WEIGHTS) - 1
        term = (luminance * contrast if last else contrast).mean().item()
        score *= term**weight
        padding = (x.shape[2] % 2, x.shape[3] % 2)
        x, y = F.avg_pool2d(x, 2, padding=padding), F.avg_pool2d(y, 2, padding=padding)
    return score


def colour_shift(original: torch.Tensor, decoded: torch.Tensor) -> tuple[float, float, float]:
    """Mean of decoded minus original for R, G and B, in levels: positive where the decoder made the picture brighter."""
    _check_pair(original, decoded)
    red, green, blue = (decoded.double() - original.double()).mean(dim=(1, 2)).tolist()
    return red, green, blue


def bpp(file_bytes: int, height: int, width: int) -> float:
    """Bits per pixel of a whole file of `file_bytes` bytes for a source picture of `height` x `width` pixels."""
    return 8 * file_bytes / (height * width)


def _check_pair(original: torch.Tensor, decoded: torch.Tensor) -> None:
    for picture in (original, decoded):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise ValueError(f"expected a uint8 tensor (3, H, W), got {picture.dtype} {tuple(picture.shape)}")
    if original.shape != decoded.shape:
        raise ValueError(f"pictures of different size: {tuple(original.shape)} and {tuple(decoded.shape)}")


def _luma(picture: torch.Tensor) -> torch.Tensor:
    """BT.601 full-range luma, rounded to levels 0..255, as float64 (1, 1, H, W)."""
    red, green, blue = picture.float() / 255
    # Near halves the rounding hangs on these float32 steps, in pyiqa's order; a level matters in flat, dark regions.
    return ((red * 0.299 + green * 0.587 + blue * 0.114) * 255).round().double()[None, None]


def _ssim_terms(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of the luminance term and of the contrast-structure term (the latter cut at 0) of two (1, 1, H, W)."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, contrast.relu()


def _blur(x: torch.Tensor) -> torch.Tensor:
    window = torch.exp(-(torch.arange(-5.0, 6.0, dtype=x.dtype, device=x.device) ** 2) / (2 * 1.5**2))
    window = window / window.sum()
    return F.conv2d(F.conv2d(x, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))


@dataclass(frozen=True)
class WeightFile:
    """A file of weights that a learned metric loads; `sha256` is the start of its hash, which its name carries."""

    name: str
    url: str
    sha256: str
    folder: Callable[[], Path]

    @property
    def path(self) -> Path:
        return self.folder() / self.name

    def is_there(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size > 0


def _checkpoints() -> Path:
    """Where torchvision looks for trained networks."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _pyiqa_cache() -> Path:
    """Where pyiqa looks for its own weights."""
    return Path(torch.hub.get_dir()) / "pyiqa"


_TORCH_URL = "https://download.pytorch.org/models"
_PYIQA_URL = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main"
VGG16 = WeightFile("vgg16-397923af.pth", f"{_TORCH_URL}/vgg16-397923af.pth", "397923af", _checkpoints)
ALEXNET = WeightFile("alexnet-owt-7be5be79.pth", f"{_TORCH_URL}/alexnet-owt-7be5be79.pth", "7be5be79", _checkpoints)
_LPIPS_VGG, _LPIPS_ALEX, _DISTS = (
    WeightFile(name, f"{_PYIQA_URL}/{name}", name.removesuffix(".pth").rpartition("-")[2], _pyiqa_cache)
    for name in ("LPIPS_v0.1_vgg-a78928a0.pth", "LPIPS_v0.1_alex-df73285e.pth", "DISTS_weights-f5e65c96.pth")
)


@dataclass(frozen=True)
class _Metric:
    """How a score is asked of pyiqa (its name there), the smallest side it takes, and the weights that it loads."""

    pyiqa_name: str
    min_side: int = 1
    weights: tuple[WeightFile, ...] = ()


# pyiqa's plain "lpips" is AlexNet; here the name always tells the network.
METRICS = {
    "psnr": _Metric("psnr"),
    "ms_ssim": _Metric("ms_ssim", min_side=MS_SSIM_MIN_SIDE),
    "fsim": _Metric("fsim"),
    "nlpd": _Metric("nlpd"),
    "gmsd": _Metric("gmsd"),
    "vsi": _Metric("vsi"),
    "vif": _Metric("vif", min_side=33),
    "lpips-vgg": _Metric("lpips-vgg", min_side=16, weights=(VGG16, _LPIPS_VGG)),
    "lpips-alex": _Metric("lpips", min_side=31, weights=(ALEXNET, _LPIPS_ALEX)),
    "dists": _Metric("dists", min_side=16, weights=(VGG16, _DISTS)),
}


def unavailable(metric: str) -> str | None:
    """None if a metric of `METRICS` can be computed now, else one line that says why not and what to do.

    Looks at installed packages and files only; nothing is imported or fetched. Raises DiffoError for an unknown name.
    """
    if metric not in METRICS:
        raise DiffoError(f"unknown metric {metric}; known are {', '.join(METRICS)}")
    if importlib.util.find_spec("pyiqa") is None:
        return f"{metric} needs the package pyiqa: pip install pyiqa"
    missing = [file.path for file in METRICS[metric].weights if not file.is_there()]
    if not missing:
        return None
    files = " and ".join(f"{path.name} (looked in {path.parent})" for path in missing)
    return f"{metric} lacks {files}; fetch with: python reproduce.py weights"


def score_with_pyiqa(
    names: Sequence[str],
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, float | None]]:
    """Yield, for each (original, decoded) of `pairs`, the scores `names` (keys of `METRICS`) by pyiqa's defaults.

    Computed in float32 without TF32 on `device`, one pair at a time. None stands for a picture too small for a metric.
    pyiqa's PSNR ends at 80 dB, for equal pictures; its VIF is 0, or NaN, where the original has hardly any detail. Raises DiffoError, before the first pair is read, with the line of
    `unavailable` for a metric that cannot be computed.
    """
    for name in names:
        if reason := unavailable(name):
            raise DiffoError(reason)
    metrics = {name: _load_quietly(METRICS[name].pyiqa_name, torch.device(device)) for name in names}
    return (_score_pair(metrics, original, decoded, torch.device(device)) for original, decoded in pairs)


def _score_pair(
    metrics: dict[str, torch.nn.Module], original: torch.Tensor, decoded: torch.Tensor, device: torch.device
) -> dict[str, float | None]:
    _check_pair(original, decoded)
    reference, distorted = (picture[None].to(device).float() / 255 for picture in (original, decoded))
    scores: dict[str, float | None] = {}
    with torch.no_grad(), full_precision():
        for name, metric in metrics.items():
            fits = min(original.shape[-2:]) >= METRICS[name].min_side
            scores[name] = metric(distorted, reference).item() if fits else None
    return scores


def _load_quietly(pyiqa_name: str, device: torch.device) -> torch.nn.Module:
    """The network inside a pyiqa metric: its wrapper switches TF32 on again for every call."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("pyiqa").setLevel(logging.WARNING)
        import pyiqa

        # pyiqa looks for MS_SSIM in a module of that name and, finding none, imports all its networks: seconds more.
        importlib.import_module("pyiqa.archs.ssim_arch")
        return pyiqa.create_metric(pyiqa_name, device=device).net


def download_weights(timeout: float = 20.0, report: Callable[[str], None] = print) -> None:
    """Fetch the weights of all learned metrics into the caches where their libraries look (about 0.8 GB in all).

    Files already there are kept. Each file ends up complete and with the hash in its name, or not at all; `report` gets
    one line for each. Raises DiffoError in one line at the first file that cannot be fetched; no single connection or
    read may take longer than `timeout` seconds.
    """
    needed = {file.name: file for metric in METRICS.values() for file in metric.weights}
    for file in needed.values():
        if file.is_there():
            report(f"{file.name}: already in {file.path.parent}")
            continue
        fetch(file.url, file.path, file.sha256, timeout)
        report(f"{file.name}: {file.path.stat().st_size / 1e6:.1f} MB, SHA-256 agrees, now in {file.path.parent}")
