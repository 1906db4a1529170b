"""Pictures from and to files, and the only conversion between 8-bit grey values and [-1, 1] in the project."""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from utils.errors import PictureError
from utils.files import PICTURES, atomic_path, find_files
from utils.limits import MAX_PIXELS, MIN_SIDE

SOFTWARE = "DiffO"  # in the `Software` text of the PNGs written here, by which they are known again


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Read a picture of any usual kind as a uint8 tensor (3, H, W), RGB, grey values 0..255.

    Alpha, palette transparency included, is composited on white; 16-bit grey is rounded to 8 bits (16-bit colour within
    one of that, by Pillow); an EXIF orientation is applied; the first frame is taken; colour profiles are ignored.

    Raises PictureError: missing, not a picture, damaged or cut short, more than `max_pixels` pixels, a side under 16,
    or a kind without a defined 8-bit range (floating point, 32-bit integers).
    """
    try:
        with open(path, "rb") as file, _strict_pillow():
            return _read_open_file(file, path, max_pixels)
    except OSError as error:
        raise PictureError(f"{path}: cannot be read ({error.strerror or _one_line(error)})") from error


def decode_image(data: bytes, name: str) -> torch.Tensor:
    """A picture file's content as `read_image` would read it; `name` is what errors call it. Raises PictureError."""
    with _strict_pillow():
        return _read_open_file(io.BytesIO(data), name)


def from_pillow(image: Image.Image, name: str, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """An image of Pillow, opened or made, as `read_image` would read it from a file; the image itself stays as it is.

    `name` is what errors call it. Raises PictureError.
    """
    with _strict_pillow():
        return _read_opened(image, name, max_pixels)


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
        image = Image.fromarray(picture.permute(1, 2, 0).cpu().contiguous().numpy())
        image.save(temporary, format="PNG", pnginfo=chunks)


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a PNG that `write_image` wrote; False for one that is missing or is no picture."""
    with suppress(Exception), _strict_pillow(), Image.open(path) as image:
        return image.format == "PNG" and image.info.get("Software") == SOFTWARE
    return False


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


def find_pictures(folder: str | os.PathLike[str], recursive: bool = False) -> list[Path]:
    """The pictures in a folder, by suffix: `find_files` with `PICTURES`."""
    return find_files(folder, PICTURES, recursive)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow without warnings, without its own limit of pixels, and refusing truncated files.

    The last is Pillow's default, but a global that other libraries switch off when they are imported.
    """
    saved = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = saved


def _read_open_file(file: BinaryIO, path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    # Pillow's decoders answer a damaged file with almost any exception: OSError, SyntaxError, struct.error, ...
    try:
        image = Image.open(file)
    except Exception as error:
        empty = file.seek(0, os.SEEK_END) == 0
        kind = "empty file" if empty else "not a picture, of an unknown kind, or cut short"
        raise PictureError(f"{path}: {kind}") from error
    return _read_opened(image, path, max_pixels)


def _read_opened(image: Image.Image, path: str | os.PathLike[str], max_pixels: int) -> torch.Tensor:
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError(f"{path}: {width}x{height} is more than the {max_pixels} pixels allowed")
    if min(width, height) < MIN_SIDE:
        raise PictureError(f"{path}: {width}x{height} is too small, both sides must be {MIN_SIDE} or more")
    try:
        image.load()
    except Exception as error:
        raise PictureError(f"{path}: damaged or cut short ({_one_line(error)})") from error
    with suppress(Exception):  # a damaged EXIF block counts as none, the picture is still good
        image = ImageOps.exif_transpose(image)
    values = _to_rgb(image, path)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def _to_rgb(image: Image.Image, path: str | os.PathLike[str]) -> np.ndarray:
    """8-bit RGB (H, W, 3) of a loaded image of any mode."""
    if image.mode == "F":
        raise PictureError(f"{path}: floating-point pictures have no defined range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        return _grey_of_16_bits(image, path)
    if not image.has_transparency_data:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
    # On white, the light that is missing scales with alpha; the sum stays below 2^16.
    missing = ((255 - rgba[..., :3]) * rgba[..., 3:] + 127) // 255
    return (255 - missing).astype(np.uint8)


def _grey_of_16_bits(image: Image.Image, path: str | os.PathLike[str]) -> np.ndarray:
    """8-bit RGB (H, W, 3) of 16-bit grey, in a 16- or a 32-bit mode: round(v / 65535 * 255) = round(v / 257)."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise PictureError(f"{path}: 32-bit pictures have no defined range; convert it to 8 or 16 bits")
    grey = (values + 128) // 257
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
