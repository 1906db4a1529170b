"""The perceptual term that a configuration names."""

from collections.abc import Callable

from torch import Tensor

from models.losses import ms_ssim_loss
from utils.errors import ConfigError
from utils.metrics import VGG16

Perceptual = Callable[[Tensor, Tensor], Tensor]


def perceptual_term(kind: str) -> Perceptual:
    """The perceptual term of a configuration: `lpips` (LPIPS-vgg, the paper's), `ms_ssim`, or `none`.

    Raises:
        ConfigError: unknown kind, or lpips without VGG weights on disk. Nothing is downloaded here.
    """
    if kind == "none":
        return lambda image, target: image.new_zeros(())
    if kind == "ms_ssim":
        return ms_ssim_loss
    if kind != "lpips":
        raise ConfigError(f"perceptual: {kind!r} is none of lpips, ms_ssim, none")
    if not VGG16.is_there():
        raise ConfigError(
            f"perceptual: lpips needs the VGG-16 weights {VGG16.path}, which are not there. Fetch them once with "
            "`python reproduce.py weights`, or train without weights: gt.perceptual=ms_ssim codec.perceptual=ms_ssim"
        )
    import lpips

    network = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)

    def term(image: Tensor, target: Tensor) -> Tensor:
        return network.to(image.device)(image, target).mean()

    return term
