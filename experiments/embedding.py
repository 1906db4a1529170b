"""Pictures as data URIs of a page: files that browsers decode as they are, others coded anew, close to the picture."""

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

# WebP, with colour at half resolution, does not come as close to most photographs at any quality, and takes more
# bytes where it does. Speed 8 takes 8 % more bytes; speed 4 saves 1 %, and takes six times as long.
_AVIF = {"format": "AVIF", "subsampling": "4:4:4", "speed": 6, "advanced": {"tune": "psnr"}}
_QUALITIES = range(50, 101)


@dataclass(frozen=True)
class Embedded:
    """A picture's data URI, and in words what it holds."""

    uri: str
    told: str


def as_it_is(data: bytes, suffix: str) -> Embedded:
    """A coded file whose suffix is one of `TYPES`."""
    return Embedded(_uri(TYPES[suffix], data), "the coded file itself")


def close_to(picture: Tensor) -> Embedded:
    """A uint8 picture (3, H, W), RGB, as AVIF of the lowest quality that reaches `MIN_PSNR`, else as lossless WebP."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())

    @cache
    def coded(quality: int) -> tuple[bytes, float]:
        data = _saved(image, quality=quality, **_AVIF)
        return data, psnr(picture, decode_image(data, "a picture of the page"))

    found = bisect_left(_QUALITIES, MIN_PSNR, key=lambda quality: coded(quality)[1])
    if found == len(_QUALITIES):
        return Embedded(_uri(TYPES[".webp"], _saved(image, format="WEBP", lossless=True)), "lossless WebP")
    data, distance = coded(_QUALITIES[found])
    return Embedded(_uri(TYPES[".avif"], data), f"AVIF of {distance:.1f} dB")


def _saved(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
