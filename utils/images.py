"""Pictures from and to files, and the only conversion between 8-bit grey values and [-1, 1] in the project."""

import io
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from utils.errors import PictureError
from utils.files import PICTURES, atomic_path, find_files
from utils.limits import MAX_PIXELS
from utils.picture_files import one_line, read_rgb, rgb_of, strict_pillow

PNG_LEVEL = 4  # of zlib: a third of the time of its default, 6, for 1 % more bytes (docs/coding.md)
SOFTWARE = "DiffO"  # in the `Software` text of the PNGs written here, by which they are known again

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk, which is the same in every PNG


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Read a picture of any usual kind as a uint8 tensor (3, H, W), RGB, grey values 0..255.

    Colours are sRGB: those with an ICC profile are converted (`utils.colour`), the others taken for it. Alpha, of
    palettes and colour keys too, is composited on white; 12- and 16-bit grey is rounded to 8 bits (16-bit colour within
    one of that, by Pillow); an EXIF orientation is applied; the first frame is taken; damaged metadata counts as none.

    Raises PictureError: missing, not a picture, damaged or cut short, more than `max_pixels` pixels, a side under 16,
    or a kind without a defined 8-bit range (floating point, signed, 32-bit integers).
    """
    try:
        with open(path, "rb") as file:
            return _read(read_rgb, file, path, max_pixels)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise PictureError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or one_line(error)})") from error


def decode_image(data: bytes, name: str) -> torch.Tensor:
    """A picture file's content as `read_image` would read it; `name` is what errors call it. Raises PictureError."""
    return _read(read_rgb, io.BytesIO(data), name, MAX_PIXELS)


def from_pillow(image: Image.Image, name: str, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """An image of Pillow, opened or made, as `read_image` would read it from a file; the image itself stays as it is.

    `name` is what errors call it. Raises PictureError.
    """
    return _read(rgb_of, image, name, max_pixels)


def write_image(path: str | os.PathLike[str], picture: torch.Tensor) -> None:
    """Write a uint8 tensor (3, H, W), sRGB, as a PNG file that says so and names its writer, complete or not at all.

    Raises PictureError if the name does not end in .png, DiffoError if the folder cannot be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise PictureError(f"{path}: pictures are written as PNG; give a name that ends in .png")
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"sRGB", b"\0")  # rendering intent: perceptual
    chunks.add_text("Software", SOFTWARE)
    with atomic_path(path) as temporary:
        to_pillow(picture).save(temporary, format="PNG", pnginfo=chunks, compress_level=PNG_LEVEL)


def to_pillow(picture: torch.Tensor) -> Image.Image:
    """A uint8 tensor (3, H, W), RGB, on any device, as an image of Pillow."""
    return Image.fromarray(picture.permute(1, 2, 0).cpu().contiguous().numpy())


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image of Pillow as it is, a uint8 tensor (3, H, W); `from_pillow` takes images of any kind."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resized(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A uint8 tensor (3, h, w) at another size, by Lanczos' filter, which Pillow computes in integers; itself at its own."""
    if picture.shape[1:] == (height, width):
        return picture
    return to_tensor(to_pillow(picture).resize((width, height), Image.Resampling.LANCZOS))


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a PNG that `write_image` wrote; False for one that is missing or is no picture."""
    with suppress(Exception), strict_pillow(), Image.open(path) as image:
        return image.format == "PNG" and image.info.get("Software") == SOFTWARE
    return False


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether a file `is_ours` and ends as a PNG does."""
    if not is_ours(path):
        return False
    with open(path, "rb") as file:
        file.seek(-len(PNG_END), os.SEEK_END)
        return file.read() == PNG_END


def to_signed(values: torch.Tensor) -> torch.Tensor:
    """Grey values 0..255 (uint8, any shape) as float32 in [-1, 1]."""
    if values.dtype != torch.uint8:
        raise ValueError(f"expected a uint8 tensor, got {values.dtype}")
    return (values.float() / 255 - 0.5) / 0.5


def to_uint8(signed: torch.Tensor) -> torch.Tensor:
    """Values in [-1, 1] (floating point, any shape) as grey values 0..255, clamped, halves rounded to even.

    Raises ValueError if there is a NaN, which no grey value can stand for.
    """
    if torch.isnan(signed).any():
        raise ValueError("a picture holds NaN: the network that made it, or its weights, are broken")
    return ((signed.float() * 0.5 + 0.5) * 255).clamp(0, 255).round().to(torch.uint8)


def find_pictures(folder: str | os.PathLike[str], left_out: Counter[str] | None = None) -> list[Path]:
    """The pictures in a folder and those below it, by suffix: `find_files` with `PICTURES`."""
    return find_files(folder, PICTURES, True, left_out)


def _read(
    rgb: Callable[..., np.ndarray], source: BinaryIO | Image.Image, path: str | os.PathLike[str], max_pixels: int
) -> torch.Tensor:
    try:
        values = rgb(source, max_pixels)
    except PictureError as error:
        raise PictureError(f"{path}: {error}") from error
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
