"""Pictures as data URIs of a page: files that browsers decode as they are, all others coded anew, close to the picture."""

import base64
import io
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache

from PIL import Image
from torch import Tensor

from measuring.metrics import psnr
from utils.images import decode_image

MIN_PSNR = 45.0  # dB over RGB, of what is shown to the picture that it stands for
TYPES = {".jpg": "image/jpeg", ".webp": "image/webp", ".avif": "image/avif"}  # what every browser decodes

_QUALITIES = range(70, 101)
# WebP halves the resolution of colour, so that many pictures do not come close to themselves at its best quality.
_LOSSY = {
    "WebP": {"format": "WEBP", "method": 4},
    "AVIF 4:4:4": {"format": "AVIF", "subsampling": "4:4:4", "speed": 8},
}


@dataclass(frozen=True)
class Embedded:
    """A picture's data URI, and in words what it holds."""

    uri: str
    told: str


def as_it_is(data: bytes, suffix: str) -> Embedded:
    """A coded file whose suffix is one of `TYPES`."""
    return Embedded(_uri(TYPES[suffix], data), "the coded file itself")


def close_to(picture: Tensor) -> Embedded:
    """A uint8 picture (3, H, W), RGB, as the smallest WebP of at least `MIN_PSNR`, else as such an AVIF, else lossless."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    for name, options in _LOSSY.items():
        if found := _smallest(picture, image, options):
            data, distance = found
            return Embedded(_uri(f"image/{options['format'].lower()}", data), f"{name} of {distance:.1f} dB")
    return Embedded(_uri("image/webp", _saved(image, format="WEBP", lossless=True, quality=50)), "lossless WebP")


def _smallest(picture: Tensor, image: Image.Image, options: dict) -> tuple[bytes, float] | None:
    """The file of the lowest quality that reaches `MIN_PSNR`, and its PSNR; None where none does."""

    @cache
    def coded(quality: int) -> tuple[bytes, float]:
        data = _saved(image, quality=quality, **options)
        return data, psnr(picture, decode_image(data, "a picture of the page"))

    found = bisect_left(_QUALITIES, MIN_PSNR, key=lambda quality: coded(quality)[1])
    return coded(_QUALITIES[found]) if found < len(_QUALITIES) else None


def _saved(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
