"""Colours as sRGB, by the ICC profile that comes with a picture (LittleCMS, through Pillow)."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

SAME = 2  # grey levels of 255: a profile that changes none by more is taken for sRGB, and the values stay as they are


def to_srgb(image: Image.Image) -> Image.Image:
    """A picture of mode L, RGB, CMYK or LAB as RGB, relative colorimetric. A profile that does not fit counts as none."""
    profile = image.info.get("icc_profile")
    convert = _conversion(profile if isinstance(profile, bytes) else b"", image.mode)
    return convert.apply(image) if convert else image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=16)
def _conversion(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB, for pictures of one mode; None if it is sRGB itself, or of no use for them."""
    if not profile and mode != "LAB":
        return None
    # The values of LAB are colours by themselves, and need no profile.
    source = ImageCms.createProfile("LAB") if mode == "LAB" else io.BytesIO(profile)
    try:
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        convert = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
    except ImageCms.PyCMSError:  # damaged, or for pictures of another mode
        return None
    return None if _changes_little(convert, mode) else convert


def _changes_little(convert: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether colours all over the cube come out as they are."""
    if mode not in ("L", "RGB"):
        return False
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(*[levels] * len(mode), indexing="ij"), axis=-1).reshape(len(levels), -1, len(mode))
    image = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
    before, after = (np.asarray(i).astype(int) for i in (image.convert("RGB"), convert.apply(image)))
    return int(np.abs(after - before).max()) <= SAME
