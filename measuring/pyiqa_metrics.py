"""Scores by pyiqa, which takes seconds to import, and the files of weights that its learned metrics load."""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from measuring.metrics import MS_SSIM_MIN_SIDE, require_pair
from utils.download import fetch
from utils.errors import DiffoError
from utils.precision import full_precision


@dataclass(frozen=True)
class WeightFile:
    """A file of weights that a learned metric loads.

    Attributes:
        name: ends with the first digits of the file's SHA-256. server: its address without the name.
        folder: where its library looks, below the folder of torch.hub.
    """

    name: str
    server: str
    folder: str

    @property
    def path(self) -> Path:
        return Path(torch.hub.get_dir()) / self.folder / self.name

    @property
    def url(self) -> str:
        return f"{self.server}/{self.name}"

    @property
    def sha256(self) -> str:
        return Path(self.name).stem.rpartition("-")[2]


_TORCHVISION = "https://download.pytorch.org/models", "checkpoints"
_PYIQA = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main", "pyiqa"
VGG16 = WeightFile("vgg16-397923af.pth", *_TORCHVISION)
ALEXNET = WeightFile("alexnet-owt-7be5be79.pth", *_TORCHVISION)
LPIPS_VGG = WeightFile("LPIPS_v0.1_vgg-a78928a0.pth", *_PYIQA)
LPIPS_ALEX = WeightFile("LPIPS_v0.1_alex-df73285e.pth", *_PYIQA)
DISTS = WeightFile("DISTS_weights-f5e65c96.pth", *_PYIQA)


@dataclass(frozen=True)
class Metric:
    """How a score is asked of pyiqa (its name there), the smallest side it takes, and the weights that it loads."""

    pyiqa_name: str
    min_side: int = 1
    weights: tuple[WeightFile, ...] = ()
    lower_is_better: bool = False


# pyiqa's plain "lpips" is AlexNet; here the name always tells the network.
METRICS = {
    "psnr": Metric("psnr"),
    "ms_ssim": Metric("ms_ssim", min_side=MS_SSIM_MIN_SIDE),
    "fsim": Metric("fsim"),
    "nlpd": Metric("nlpd", lower_is_better=True),
    "gmsd": Metric("gmsd", lower_is_better=True),
    "vsi": Metric("vsi"),
    "vif": Metric("vif", min_side=33),
    "lpips-vgg": Metric("lpips-vgg", 16, (VGG16, LPIPS_VGG), lower_is_better=True),
    "lpips-alex": Metric("lpips", 31, (ALEXNET, LPIPS_ALEX), lower_is_better=True),
    "dists": Metric("dists", 16, (VGG16, DISTS), lower_is_better=True),
}


def unavailable(metric: str) -> str | None:
    """None if a metric of `METRICS` can be computed now, else one line that says why not and what to do.

    Looks at installed packages and files only; nothing is imported or fetched. Raises DiffoError for an unknown name.
    """
    if metric not in METRICS:
        raise DiffoError(f"unknown metric {metric}; known are {', '.join(METRICS)}")
    if importlib.util.find_spec("pyiqa") is None:
        return f"{metric} needs the package pyiqa: pip install pyiqa"
    missing = [file.path for file in METRICS[metric].weights if not file.path.is_file()]
    if not missing:
        return None
    files = " and ".join(f"{path.name} (looked in {path.parent})" for path in missing)
    return f"{metric} lacks {files}; fetch with: python reproduce.py weights"


def score_with_pyiqa(
    names: Sequence[str], pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device | str = "cpu"
) -> Iterator[dict[str, float | None]]:
    """Yield, for each (original, decoded) of `pairs`, the scores `names` (keys of `METRICS`) by pyiqa's defaults.

    Pictures are uint8 (3, H, W), RGB. Computed in float32 without TF32 on `device`, one pair at a time. None stands for
    a picture too small for a metric. pyiqa's PSNR ends at 80 dB, for equal pictures; its VIF is 0, or NaN, where the
    original has hardly any detail.

    Raises DiffoError, before the first pair is read, with the line of `unavailable` for one that cannot be computed.
    """
    for name in names:
        if reason := unavailable(name):
            raise DiffoError(reason)
    metrics = {name: _load_quietly(METRICS[name].pyiqa_name, torch.device(device)) for name in names}

    @torch.no_grad()
    @full_precision()
    def scores(original: torch.Tensor, decoded: torch.Tensor) -> dict[str, float | None]:
        require_pair(original, decoded)
        reference, distorted = (picture[None].to(device).float() / 255 for picture in (original, decoded))
        fits = {name: min(original.shape[-2:]) >= METRICS[name].min_side for name in names}
        return {n: metric(distorted, reference).item() if fits[n] else None for n, metric in metrics.items()}

    return (scores(*pair) for pair in pairs)


def _load_quietly(pyiqa_name: str, device: torch.device) -> torch.nn.Module:
    """The network inside a pyiqa metric: its wrapper switches TF32 on again for every call."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("pyiqa").setLevel(logging.WARNING)
        import pyiqa

        # pyiqa looks for MS_SSIM in a module of that name and, finding none, imports all its networks: seconds more.
        importlib.import_module("pyiqa.archs.ssim_arch")
        return pyiqa.create_metric(pyiqa_name, device=device).net


def download_weights(timeout: float = 20.0) -> None:
    """Fetch the weights of all learned metrics into the caches where their libraries look (about 0.8 GB in all).

    Files already there are kept; a line is printed for each. No connection or read may take longer than `timeout`
    seconds. Raises DiffoError at the first file that cannot be fetched, of which nothing stays.
    """
    for file in dict.fromkeys(file for metric in METRICS.values() for file in metric.weights):
        if file.path.is_file():
            print(f"{file.name}: already in {file.path.parent}")
        else:
            fetch(file.url, file.path, file.sha256, timeout)
            print(f"{file.name}: {file.path.stat().st_size / 1e6:.1f} MB, SHA-256 agrees, now in {file.path.parent}")
