"""The perceptual term that a configuration names."""

from collections.abc import Callable

from torch import Tensor, nn

from measuring.pyiqa_metrics import VGG16
from models.losses import ms_ssim_loss
from utils.errors import ConfigError
from utils.imports import quiet

Perceptual = Callable[[Tensor, Tensor], Tensor]


def perceptual_term(kind: str, untrained: bool = False) -> Perceptual:
    """The perceptual term of a configuration: `lpips` (LPIPS-vgg, the paper's), `ms_ssim`, or `none`.

    Args:
        untrained: LPIPS with random weights, for its shapes alone; none are needed on disk.
    Raises:
        ConfigError: unknown kind, or lpips without VGG weights on disk. Nothing is downloaded here.
    """
    if kind == "none":
        return lambda image, target: image.new_zeros(())
    if kind == "ms_ssim":
        return ms_ssim_loss
    if kind != "lpips":
        raise ConfigError(f"perceptual: {kind!r} is none of lpips, ms_ssim, none")
    if not untrained and not VGG16.is_there():
        raise ConfigError(
            f"perceptual: lpips needs the VGG-16 weights {VGG16.path}, which are not there. Fetch them once with "
            "`python reproduce.py weights`, or train without weights: gt.perceptual=ms_ssim codec.perceptual=ms_ssim"
        )
    return Lpips(untrained)


class Lpips(nn.Module):
    """LPIPS-vgg, a mean over the batch; it follows the pictures to their device and precision."""

    def __init__(self, untrained: bool):
        super().__init__()
        with quiet():
            import lpips

            network = lpips.LPIPS(net="vgg", verbose=False, pretrained=not untrained, pnet_rand=untrained)
        self.network = network.eval().requires_grad_(False)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return self.network.to(image)(image, target).mean()
