"""Pictures as data URIs of a page: files that browsers decode as they are, others coded anew, close to the picture."""

import base64
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from experiments.baselines import saved
from measuring.metrics import psnr
from utils.images import decode_image, resized, to_pillow

MIN_PSNR = 45.0  # dB over RGB, of what is shown to the picture that it stands for
TYPES = {".jpg": "image/jpeg", ".webp": "image/webp", ".avif": "image/avif"}  # what every browser decodes

# WebP, with colour at half resolution, does not come as close to most photographs at any quality, and takes more
# bytes where it does.
_AVIF = {"format": "AVIF", "subsampling": "4:4:4", "advanced": {"tune": "psnr"}}
_QUALITIES = range(50, 101)
# A step of quality is 0.6 dB and 20 % of the bytes. Speed 4, which takes four times as long, gives 0.1 to 0.2 dB: it is
# worth its time where that saves the step.
_SPEED, _SLOWER, _WORTH = 6, 4, 0.2


@dataclass(frozen=True)
class Embedded:
    """A picture's data URI, in words what it holds, and whether the page has to enlarge it, as `resized` does."""

    uri: str
    told: str
    halved: bool = False


def as_it_is(data: bytes, suffix: str, halved: bool = False) -> Embedded:
    """A coded file whose suffix is one of `TYPES`."""
    return Embedded(_uri(TYPES[suffix], data), "the coded file itself", halved)


def close_to(picture: Tensor, small: Tensor | None = None) -> Embedded:
    """A uint8 picture (3, H, W), RGB, as AVIF of the lowest quality that reaches `MIN_PSNR`, else as lossless WebP.

    Args:
        small: what `resized` makes the picture of: it is coded instead, and what counts is how it looks enlarged.
    """
    image = to_pillow(picture if small is None else small)

    @cache
    def coded(quality: int, speed: int = _SPEED) -> tuple[float, bytes]:
        data = saved(image, quality=quality, speed=speed, **_AVIF)
        return psnr(picture, resized(decode_image(data, "a picture of the page"), *picture.shape[1:])), data

    found = bisect_left(_QUALITIES, MIN_PSNR, key=lambda quality: coded(quality)[0])
    if found == len(_QUALITIES):
        return Embedded(
            _uri(TYPES[".webp"], saved(image, format="WEBP", lossless=True)), "lossless WebP", small is not None
        )
    distance, data = coded(_QUALITIES[found])
    below = _QUALITIES[max(found - 1, 0)]
    if MIN_PSNR > coded(below)[0] > MIN_PSNR - _WORTH and (slower := coded(below, _SLOWER))[0] >= MIN_PSNR:
        distance, data = slower
    return Embedded(_uri(TYPES[".avif"], data), f"AVIF of {distance:.1f} dB", small is not None)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
