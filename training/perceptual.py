"""The perceptual terms that a configuration names."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from measuring.weights import VGG16
from models.losses import (
    border_loss,
    detail_loss,
    flat_loss,
    lines_loss,
    ms_ssim_loss,
    peak_loss,
    spectrum_loss,
    weave_loss,
)
from training.perceptual_networks import PACKAGED, FeatureDistance, StLpips, packaged
from training.stage_config import StageParams
from utils.errors import ConfigError
from utils.imports import quiet

VGG = ("lpips", "stlpips")  # terms that look through it
PLAIN = {  # terms that look through no network
    "ms_ssim": ms_ssim_loss,
    "weave": weave_loss,
    "lines": lines_loss,
    "flat": flat_loss,
    "peak": peak_loss,
    "spectrum": spectrum_loss,
    "border": border_loss,
    "detail": detail_loss,
}


def perceptual_terms(
    factors: Mapping[str, float], untrained: bool = False, tf32: bool = False, window: int | None = None
) -> nn.ModuleDict:
    """The terms by name, each (image, target) -> scalar of pictures N x 3 x H x W in [-1, 1]; those of factor 0 are left out.

    Args:
        factors: by name: `lpips` (LPIPS-vgg, the paper's), `stlpips` (ST-LPIPS-vgg), `features` (of EfficientNet-Lite0),
            `ms_ssim` (1 - MS-SSIM of the luma, sides from 161 pixels), `weave` (what repeats every 16 pixels on smooth ground,
            sides from 64 pixels), `lines` (what stands out of the error's spectrum at multiples of 1/16 cycles per pixel, sides
            from 192 pixels), `flat` (absolute error where the original has one colour), `peak` (the same where it is largest),
            `border` (squared error of the outermost 8 pixels), `detail` (local energies of detail),
            `spectrum` (the same by frequency).
        untrained: LPIPS with random weights, for its shapes alone; none are needed on disk.
        tf32: their networks compute in it while training.
        window: side, in pixels, of the square in the middle that terms of VGG see; None shows them all.
    Raises:
        ConfigError: lpips without VGG weights on disk, or a package that is not installed. Nothing is downloaded here.
    """
    makers = {"lpips": lambda: Lpips(untrained), "stlpips": StLpips, "features": FeatureDistance}
    makers |= {name: partial(Plain, term) for name, term in PLAIN.items()}
    terms = {name: makers[name]() for name, factor in factors.items() if factor}
    if window:
        terms |= {name: Middle(terms[name], window) for name in VGG if name in terms}
    if tf32:
        terms = {name: term if name in PLAIN else InTf32(term) for name, term in terms.items()}
    return nn.ModuleDict(terms)


def require_networks(params: StageParams) -> None:
    """Raise ConfigError for what a stage compares or judges pictures with, if its weights are not here; loads none."""
    require_available(params.perceptual)
    if params.adversary.weight and params.adversary.kind == "projected":
        packaged("features", "adversary.kind: projected")
    if getattr(params, "energy_weight", 0):
        packaged("features", "energy_weight")


def require_available(factors: Mapping[str, float]) -> None:
    """Raise ConfigError for a term whose weights are not here, without loading any."""
    for name in (name for name, factor in factors.items() if factor):
        if name in PACKAGED:
            packaged(name)
        if name == "lpips" and not VGG16.path.is_file():
            raise ConfigError(
                f"perceptual.lpips needs the VGG-16 weights {VGG16.path}, which are not there. Fetch them once with "
                "`python reproduce.py weights`, or train with another term: gt.perceptual.lpips=0 gt.perceptual.ms_ssim=1, "
                "and the same for other stages"
            )


class Lpips(nn.Module):
    """LPIPS-vgg, a mean over the batch; it follows the pictures to their device and precision."""

    def __init__(self, untrained: bool = False):
        super().__init__()
        if not untrained:
            require_available({"lpips": 1.0})
        with quiet():
            import lpips

            network = lpips.LPIPS(net="vgg", verbose=False, pretrained=not untrained, pnet_rand=untrained)
        self.network = network.eval().requires_grad_(False)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return self.network.to(image)(image, target).mean()


class Plain(nn.Module):
    """A term that needs no weights."""

    def __init__(self, term: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.term = term

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return self.term(image, target)


class Middle(nn.Module):
    """A term of the middle of the pictures, a square of so many pixels; of smaller pictures whole."""

    def __init__(self, term: nn.Module, side: int):
        super().__init__()
        self.term, self.side = term, side

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        top, left = (max(0, (length - self.side) // 2) for length in image.shape[2:])
        rows, columns = slice(top, top + self.side), slice(left, left + self.side)
        return self.term(image[..., rows, columns], target[..., rows, columns])


class InTf32(nn.Module):
    """A term whose network computes in TF32 while training, in its backward pass too; other passes are float32.

    TF32 is a switch of the process, which the backward pass of a step would find off. So the gradient is computed along
    with the term, and is there as often as it is asked for: the adversary's adaptive factor asks for it once more.
    """

    def __init__(self, term: nn.Module):
        super().__init__()
        self.term = term

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and image.requires_grad):
            return self.term(image, target)
        return _WithGradient.apply(image, target, self.term)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, target, term):
        own, cudnn = image.detach().requires_grad_(), torch.backends.cudnn
        kept = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
        with torch.enable_grad(), cudnn.flags(**kept, allow_tf32=True):
            value = term(own, target)
            (gradient,) = torch.autograd.grad(value, own)
        ctx.save_for_backward(gradient)
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        return scale * ctx.saved_tensors[0], None, None
