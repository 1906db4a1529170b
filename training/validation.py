"""Scores on pictures that are not trained on, with the averaged weights."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from measuring.metrics import MS_SSIM_MIN_SIDE, ms_ssim, psnr
from models.bitstream import CELL
from training.config import ValidationParams
from training.stage import Evaluated, Stage
from utils import distributed
from utils.ema import Ema
from utils.errors import ConfigError, NotFinite, PictureError
from utils.images import find_pictures, read_image, to_signed, to_uint8

SHOWN = 4  # pictures in the grid


class Validation:
    """A fixed set of pictures, shared out over the ranks.

    Raises:
        ConfigError: no pictures in the folder. PictureError: one that cannot be read, or is smaller than the crop.
    """

    def __init__(self, params: ValidationParams, device: torch.device, least_sides: Mapping[str, int]):
        self.params, self.device = params, device
        self.files = find_pictures(Path(params.folder))[: params.limit]
        if not self.files:
            raise ConfigError(f"{params.folder}: no pictures there to validate on")
        for path in self.files[distributed.rank() :: distributed.world_size()]:  # told now, not after hours
            height, width = self._picture(path).shape[1:]
            needs = {"validation": CELL} | {f"perceptual.{name}": side for name, side in least_sides.items()}
            for name, side in needs.items():
                if min(height, width) < side:
                    raise PictureError(f"{path}: {width}x{height} pixels; {name} needs sides from {side}")

    def _picture(self, path: Path) -> Tensor:
        """uint8 (3, H, W), sides multiples of 16."""
        picture = read_image(path)
        height, width = picture.shape[1:]
        if self.params.crop is None:
            return picture[:, : height // CELL * CELL, : width // CELL * CELL]
        if min(height, width) < self.params.crop:
            raise PictureError(f"{path}: {width}x{height} pixels are less than validation.crop {self.params.crop}")
        return centre(picture, self.params.crop)

    def run(self, stage: Stage, averages: Ema) -> tuple[dict[str, float], list[Tensor]]:
        """Mean scores over all pictures, and rows for a grid: originals, then each of the results.

        `loss`, `psnr` (dB, RGB, 8 bits), `ms_ssim` (luma; only where no picture is too small for it) and `bpp`.

        Raises:
            NotFinite: the loss or the result of a picture is not, on every rank alike.
        """
        rank, world = distributed.rank(), distributed.world_size()
        found: list[dict[str, float]] = []
        shown: list[list[Tensor]] = []
        broken: list[str] = []
        with averages.applied(stage.trained):
            for index in range(rank, len(self.files), world):
                picture = self._picture(self.files[index])
                made = stage.evaluate(to_signed(picture)[None].to(self.device), index)
                if not finite(made):
                    broken.append(self.files[index].name)
                    continue
                found.append(scores(picture, made))
                if len(shown) < SHOWN:
                    shown.append([to_signed(picture), *(image[0].cpu() for image, _ in made.results.values())])
        if names := [name for part in distributed.gather_objects(broken) for name in part]:
            raise NotFinite(f"validation, the picture {names[0]} ({len(names)} such): loss or result is not finite")
        every = [one for part in distributed.gather_objects(found) for one in part]
        names = [name for name in every[0] if all(name in one for one in every)]
        return {name: sum(one[name] for one in every) / len(every) for name in names}, grid(shown)


def finite(made: Evaluated) -> bool:
    return math.isfinite(made.loss) and all(image.isfinite().all() for image, _ in made.results.values())


def scores(picture: Tensor, made: Evaluated) -> dict[str, float]:
    """Scores of one picture, uint8 (3, H, W)."""
    values = {"loss": made.loss}
    for suffix, (image, bpp) in made.results.items():
        decoded = to_uint8(image[0].float().cpu())
        values[f"psnr{suffix}"] = psnr(picture, decoded)
        if min(picture.shape[1:]) >= MS_SSIM_MIN_SIDE:
            values[f"ms_ssim{suffix}"] = ms_ssim(picture, decoded)
        if bpp is not None:
            values[f"bpp{suffix}"] = bpp
    return values


def centre(picture: Tensor, side: int) -> Tensor:
    """The square in the middle: ... x H x W -> ... x side x side."""
    top, left = ((length - side) // 2 for length in picture.shape[-2:])
    return picture[..., top : top + side, left : left + side]


def grid(shown: list[list[Tensor]]) -> list[Tensor]:
    """Pictures of one column each -> rows N x 3 x S x S of their middles."""
    side = min((min(image.shape[1:]) for column in shown for image in column), default=0)
    return [torch.stack([centre(image, side) for image in row]) for row in zip(*shown, strict=True)]
