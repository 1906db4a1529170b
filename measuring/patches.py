"""Distances between the patches of two sets of pictures, in the features of a trained network: KID and FID.

Patches as Mentzer et al. take them ("High-fidelity generative image compression", NeurIPS 2020, appendix): 256x256
from the top left corner, then again with the origin shifted by 128 pixels down and right, one row and one column less.
Kodak has 192, CLIC2020 test 28,650. FID is refused for fewer than 5,000, where it says more of their number than of
the pictures; KID is unbiased at any.

`kid` and `fid` look through Inception v3, as everywhere; its weights come from the web. Those of other names look through
networks whose weights are in a package: EfficientNet-Lite0, and the AlexNet trunk of ST-LPIPS, which no training here
looks through. Their numbers are to be compared only with each other, and not for a codec that was trained against the
same network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measuring.evaluator import network_of
from measuring.intervals import PERCENTILES, Interval
from measuring.weights import INCEPTION, LITE0, LITE0_NETWORK, STLPIPS_ALEX, PackagedFile, WeightFile, lacking
from utils import checkpoints
from utils.errors import DiffoError
from utils.precision import full_precision

PATCH = 256
FID_PATCHES = 5000
KID_PICTURES = 4  # for its interval: half of them is more than one
HALVES = 1000
BATCH = 16

Features = Mapping[str, Tensor]  # by network: (patches, channels) of one picture


@dataclass(frozen=True)
class Distance:
    """A distance between sets of patches: its heading, a sentence that says how, the network's name and weights."""

    heading: str
    convention: str
    network: str
    weights: tuple[WeightFile | PackagedFile, ...]
    lower_is_better: bool = True
    unit: str = ""
    decimals: int = 4


_INCEPTION = "inception", (INCEPTION,)
_LITE0 = "lite0", (LITE0, LITE0_NETWORK)
_STLPIPS_ALEX = "stlpips-alex", (STLPIPS_ALEX,)
_TRUNK = "the AlexNet trunk of ST-LPIPS (last stage, 256 features, of unit length at every position)"
DISTANCES = {
    "kid": Distance(
        "KID",
        "Unbiased MMD of a cubic kernel, Inception v3 (2048 features); interval by random halves of the pictures.",
        *_INCEPTION,
    ),
    "fid": Distance("FID", "Inception v3 (2048 features), resized as TensorFlow did.", *_INCEPTION),
    "kid-lite0": Distance("KID-Lite0", "As KID, but EfficientNet-Lite0 (1280 features): not KID.", *_LITE0),
    "fid-lite0": Distance("FID-Lite0", "As FID, but EfficientNet-Lite0 (1280 features): not FID.", *_LITE0),
    "kid-stlpips-alex": Distance("KID-ST-LPIPS-alex", f"As KID, but {_TRUNK}: not KID.", *_STLPIPS_ALEX),
    "fid-stlpips-alex": Distance("FID-ST-LPIPS-alex", f"As FID, but {_TRUNK}: not FID.", *_STLPIPS_ALEX),
}


def unavailable(name: str) -> str | None:
    """None if a distance of `DISTANCES` can be computed now, else one line that says why not and what to do.

    Nothing is fetched or imported. Raises DiffoError for an unknown name.
    """
    if name not in DISTANCES:
        raise DiffoError(f"unknown distance {name}; known are {', '.join(DISTANCES)}")
    return lacking(name, DISTANCES[name].weights)


class PatchDistances:
    """Distances between originals and what they decode to, from features that are computed once for each picture.

    Attributes:
        names: distances that can be computed. left_out: the others, each with one line that says why.
    Raises:
        DiffoError: a name that is not in `DISTANCES`.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu"):
        reasons = {name: unavailable(name) for name in names}
        self.names = [name for name, reason in reasons.items() if reason is None]
        self.left_out = {name: reason for name, reason in reasons.items() if reason}
        self.device = torch.device(device)
        networks = dict.fromkeys(DISTANCES[name].network for name in self.names)
        self._networks = {name: _NETWORKS[name](self.device) for name in networks}

    @torch.no_grad()
    @full_precision()
    def features(self, picture: Tensor) -> Features:
        """Features of the patches of a uint8 picture (3, H, W), RGB; of none if a side is under 256 pixels."""
        batches = [batch.to(self.device) for batch in patches(picture).split(BATCH)]
        return {name: torch.cat([network(b).cpu() for b in batches]) for name, network in self._networks.items()}

    def between(
        self, originals: Sequence[Features], decoded: Sequence[Features]
    ) -> tuple[dict[str, Interval], dict[str, str]]:
        """The distances over all pictures, and those that are refused, each with one line that says why.

        Args:
            originals, decoded: `features` of the same pictures, in the same order.
        """
        found, refused = {}, {}
        for name in self.names:
            real, fake = (_seen(name, side) for side in (originals, decoded))
            if reason := _refused(name, [len(features) for features in real]):
                refused[name] = reason
            else:
                found[name] = fid(real, fake) if name.startswith("fid") else kid(real, fake)
        return found, refused

    def changes(
        self, originals: Sequence[Features], decoded: Sequence[Features], reference: Sequence[Features]
    ) -> dict[str, Interval]:
        """How much larger every kernel distance of `decoded` is than that of `reference`; those that are not refused.

        Args:
            originals, decoded, reference: `features` of the same pictures, in the same order.
        """
        sides = {name: [_seen(name, side) for side in (originals, decoded, reference)] for name in self.names}
        counts = {name: [len(features) for features in real] for name, (real, *_) in sides.items()}
        names = [name for name in self.names if name.startswith("kid") and not _refused(name, counts[name])]
        return {name: kid(*sides[name]) for name in names}


def _seen(name: str, side: Sequence[Features]) -> list[Tensor]:
    """What a distance's network saw of every picture."""
    return [features[DISTANCES[name].network] for features in side]


def patches(picture: Tensor) -> Tensor:
    """The patches of a picture (3, H, W): (N, 3, 256, 256), N = floor(H/256) floor(W/256) and that with one less each."""
    rows, columns = (side // PATCH for side in picture.shape[1:])
    shifted = max(rows - 1, 0), max(columns - 1, 0)
    return torch.cat([_grid(picture, rows, columns), _grid(picture[:, PATCH // 2 :, PATCH // 2 :], *shifted)])


def _grid(picture: Tensor, rows: int, columns: int) -> Tensor:
    region = picture[:, : rows * PATCH, : columns * PATCH]
    cells = region.reshape(3, rows, PATCH, columns, PATCH).permute(1, 3, 0, 2, 4)
    return cells.reshape(rows * columns, 3, PATCH, PATCH)


def _refused(name: str, counts: Sequence[int]) -> str | None:
    """One line that says why a distance of pictures with so many patches would mean nothing; None if it would."""
    if 0 in counts:
        return f"{name}: {counts.count(0)} of {len(counts)} pictures have no side of {PATCH} pixels, and it is over all"
    if name.startswith("fid") and sum(counts) < FID_PATCHES:
        return f"{name}: {sum(counts):,} patches, and it is biased for fewer than {FID_PATCHES:,}"
    if len(counts) < KID_PICTURES:
        return f"{name}: {len(counts)} pictures, and its interval needs {KID_PICTURES}"
    return None


def fid(originals: Sequence[Tensor], decoded: Sequence[Tensor]) -> Interval:
    """Frechet distance of features, by torchmetrics (Heusel et al., NeurIPS 2017); it has no interval.

        |mu_x - mu_y|^2 + trace(C_x + C_y - 2 (C_x C_y)^(1/2))

    Args:
        originals, decoded: of every picture, (patches, channels).
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    identity = nn.Identity()
    identity.num_features = originals[0].shape[1]
    metric = FrechetInceptionDistance(identity)
    for side, real in ((originals, True), (decoded, False)):
        metric.update(torch.cat(list(side)).double(), real=real)
    return Interval(metric.compute().item())


def kid(originals: Sequence[Tensor], decoded: Sequence[Tensor], reference: Sequence[Tensor] | None = None) -> Interval:
    """Kernel distance of features (Binkowski et al., ICLR 2018) with its 95 % interval; unbiased, so it may be below 0.

        mean k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i),   k(x, y) = (x . y / d + 1)^3

    Over patches i and j of different pictures (the U-statistic of Gretton et al., JMLR 2012): y_i is no independent
    draw where it decodes x_i, nor are patches of one picture. The field's mean over subsets of 1,000 patches estimates
    the same number. The interval holds 95 % of the distances of random halves of the pictures: a half varies about the
    whole as the whole varies about the truth (half-samples, McCarthy 1969).

    Args:
        originals, decoded: of every picture, (patches, channels), the same numbers of patches; at least four pictures.
        reference: as `decoded`; its distance is taken away, over the same halves, where it is given.
    """
    counts = torch.tensor([len(features) for features in originals], dtype=torch.double)
    sums = _pair_sums(originals, decoded)
    if reference is not None:
        sums = sums - _pair_sums(originals, reference)
    pairs = counts.outer(counts).fill_diagonal_(0)

    def distances(chosen: Tensor) -> Tensor:
        """Of subsets of the pictures, (subsets, pictures) of 0 or 1."""
        return torch.einsum("si,ij,sj->s", chosen, sums, chosen) / torch.einsum("si,ij,sj->s", chosen, pairs, chosen)

    order = torch.rand(HALVES, len(counts), generator=torch.Generator().manual_seed(0)).argsort(1)
    halves = distances((order < len(counts) // 2).double())
    low, high = torch.quantile(halves, torch.tensor(PERCENTILES, dtype=torch.double) / 100).tolist()
    return Interval(distances(torch.ones_like(counts)[None]).item(), low, high)


def _pair_sums(originals: Sequence[Tensor], decoded: Sequence[Tensor]) -> Tensor:
    """Sums of what is averaged over all patches of two pictures, (pictures, pictures); 0 for one picture with itself."""
    across = _kernel_sums(originals, decoded)
    within = _kernel_sums(originals, originals) + _kernel_sums(decoded, decoded)
    return (within - across - across.T).fill_diagonal_(0)


def _kernel_sums(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Sums of the kernel between all patches of a picture of a and of one of b, (pictures, pictures)."""
    whole, counts = torch.cat(list(b)).double(), [len(features) for features in b]
    rows = (((features.double() @ whole.T / whole.shape[1] + 1) ** 3).sum(0) for features in a)
    return torch.stack([torch.stack([part.sum() for part in row.split(counts)]) for row in rows])


def _inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(INCEPTION.path)).to(device)
    return lambda patches: network(patches)[0]


def _lite0(device: torch.device) -> Callable[[Tensor], Tensor]:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(checkpoints.read(LITE0.path))
    network.eval().to(device)
    return lambda patches: network.extract_features((patches.float() - 127) / 128).mean((2, 3))


def _stlpips_alex(device: torch.device) -> Callable[[Tensor], Tensor]:
    network = network_of("stlpips-alex", device)

    def features(patches: Tensor) -> Tensor:
        last = network.net(network.scaling_layer(patches.float() / 127.5 - 1))[-1]
        unit = F.normalize(last, dim=1, eps=1e-10)  # as ST-LPIPS compares them: themselves, they are some thousandths
        return unit.mean((2, 3)) * last.shape[1] ** 0.5  # so that x . y / d of the kernel is a cosine

    return features


_NETWORKS = {"inception": _inception, "lite0": _lite0, "stlpips-alex": _stlpips_alex}
