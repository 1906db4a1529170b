"""Other codecs, really run: each picture's largest file within a number of bytes.

All code 8-bit RGB, with settings that were found best, or no worse than slower ones, at 0.03 to 0.3 bits per pixel of
Kodak. A codec that cannot get so small codes the picture at half size, both ways by Lanczos.
"""

import importlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, features

from utils.errors import DiffoError
from utils.images import resized, to_pillow, to_tensor

Encode = Callable[[Image.Image, int], bytes]


@dataclass(frozen=True)
class Coded:
    """A file and what it decodes to.

    Attributes:
        data: the whole file. payload: bytes of it without container, `len(data)` where there is none worth the name.
        setting: what the encoder was asked for. scale: of the coded picture's sides, 1 or 0.5.
        decoded: uint8 (3, H, W), at the original's size.
    """

    data: bytes
    payload: int
    setting: str
    scale: float
    decoded: torch.Tensor


@dataclass(frozen=True)
class Baseline:
    """A codec with one setting. Pictures are uint8 (3, H, W), RGB.

    Attributes:
        name: its key in `BASELINES`. label: for tables and charts. suffix: of its files.
        encode: picture and setting -> file. settings: all of them, towards larger files. setting: one, in words.
        package: the PyPI package that adds it to Pillow, and `module`, its import; or `feature`, as Pillow calls it.
        payload: bytes of a file without container.
        ripple: how many settings beyond the first file that is too large may bring a smaller one again.
    """

    name: str
    label: str
    suffix: str
    encode: Encode
    settings: Sequence[int]
    setting: str
    package: str | None = None
    module: str | None = None
    feature: str | None = None
    payload: Callable[[bytes], int] = len
    ripple: int = 0

    def unavailable(self) -> str | None:
        """None if it can be run here, else one line that says why not and what to do; nothing is imported."""
        if self.package and importlib.util.find_spec(self.module) is None:
            return f"{self.label} needs the package {self.package}: pip install {self.package}"
        if self.feature and not features.check(self.feature):
            return f"{self.label} is missing from this Pillow: pip install --force-reinstall pillow"
        return None

    def fit(self, image: torch.Tensor, max_bytes: int, payload: bool = False) -> Coded | None:
        """The largest file within `max_bytes`, at half size where full size has none; None where neither has one.

        Args:
            payload: count the bytes without container instead of the file's.
        Raises:
            DiffoError: as `unavailable`.
        """
        self._require()
        size = self.payload if payload else len
        for scale in (1.0, 0.5):
            picture = _scaled(image, scale)
            if (found := self._largest(picture, lambda data: size(data) <= max_bytes)) is not None:
                return self._coded(image, *found, scale)
        return None

    def smallest(self, image: torch.Tensor) -> Coded:
        """The codec's floor: its lowest setting at half size. Raises DiffoError as `unavailable`."""
        return self.at(image, self.settings[0], scale=0.5)

    def at(self, image: torch.Tensor, setting: int, scale: float = 1.0) -> Coded:
        """The file at one of `settings`. Raises DiffoError as `unavailable`."""
        self._require()
        return self._coded(image, setting, self.encode(_scaled(image, scale), setting), scale)

    def _largest(self, picture: Image.Image, fits: Callable[[bytes], bool]) -> tuple[int, bytes] | None:
        """The setting with the largest file that fits, and the file: bisection, then the ripple beyond it."""
        low, high, best = 0, len(self.settings) - 1, None
        if not (self.ripple or fits(self.encode(picture, self.settings[0]))):
            return None  # without the search's many larger files
        while low <= high:
            middle = (low + high) // 2
            data = self.encode(picture, self.settings[middle])
            if fits(data):
                best, low = (self.settings[middle], data), middle + 1
            else:
                high = middle - 1
        for setting in self.settings[low + 1 : low + 1 + self.ripple]:
            data = self.encode(picture, setting)
            if fits(data) and (best is None or len(data) >= len(best[1])):
                best = setting, data
        return best

    def _coded(self, image: torch.Tensor, setting: int, data: bytes, scale: float) -> Coded:
        decoded = resized(self.opened(data), *image.shape[1:])
        return Coded(data, self.payload(data), self.setting.format(setting), scale, decoded)

    def opened(self, data: bytes) -> torch.Tensor:
        """What a file decodes to, at the size that was coded: uint8 (3, h, w). Raises DiffoError as `unavailable`."""
        self._require()
        with Image.open(io.BytesIO(data)) as file:
            return to_tensor(file.convert("RGB"))

    def _require(self) -> None:
        if reason := self.unavailable():
            raise DiffoError(reason)
        if self.module:
            plugin = importlib.import_module(self.module)  # JPEG XL's registers itself
            if self.module == "pillow_heif":
                plugin.register_heif_opener()


def _scaled(image: torch.Tensor, scale: float) -> Image.Image:
    """The picture with its sides times `scale`, rounded up."""
    return to_pillow(image if scale == 1 else resized(image, *((side + 1) // 2 for side in image.shape[1:])))


def saved(picture: Image.Image, format: str, **options: object) -> bytes:
    """The bytes of a picture's file, by a format and options of Pillow."""
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    """4:2:0, with tables of its own; sequential or progressive, whichever is smaller."""
    options = {"quality": quality, "subsampling": "4:2:0", "optimize": True}
    return min((saved(picture, "JPEG", progressive=kind, **options) for kind in (False, True)), key=len)


def _jpeg2000(picture: Image.Image, target: int) -> bytes:
    """A raw codestream: wavelet 9-7 and irreversible colour transform, one layer, one tile, blocks of 64x64.

    Six levels, where the picture is large enough, gave 0.1 dB over the usual five on some of Kodak at 1,650 bytes.
    """
    width, height = picture.size
    options = {"irreversible": True, "mct": 1, "num_resolutions": min(7, min(width, height).bit_length())}
    options |= {"quality_mode": "rates", "quality_layers": [3 * width * height / target], "comment": " "}
    data = saved(picture, "JPEG2000", no_jp2=True, **options)
    comment = b"\xff\x64\x00\x05\x00\x01 "  # OpenJPEG names itself in 37 bytes where none is given
    return data.replace(comment, b"", 1)


def _webp(picture: Image.Image, quality: int) -> bytes:
    return saved(picture, "WEBP", quality=quality, method=6)


def _avif(picture: Image.Image, quality: int) -> bytes:
    """4:2:0, which at equal MS-SSIM is 5 % smaller than 4:4:4; libaom's still-picture tuning, Pillow's default.

    Speed 3: slower ones take up to eight times as long and change bytes at equal scores by less than 1 %.
    """
    return saved(picture, "AVIF", quality=quality, speed=3, subsampling="4:2:0", max_threads=1)


def _heic(picture: Image.Image, crf: int) -> bytes:
    """One intra picture by x265, as BPG is: 4:2:0, preset veryslow, tuned for SSIM as libheif does by default."""
    return saved(picture, "HEIF", chroma="420", enc_params={"preset": "veryslow", "x265:crf": str(crf)})


def _jxl(picture: Image.Image, quality: int) -> bytes:
    """A bare codestream. Effort 5: up to 5 % smaller at equal scores than 7 to 9, whose tuning is for higher rates."""
    return saved(picture, "JXL", quality=quality, effort=5, num_threads=1)


def media_bytes(data: bytes) -> int:
    """Bytes in the `mdat` boxes of an ISO base media file (AVIF, HEIC): the coded picture, without parameter sets."""
    position = total = 0
    while position < len(data):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        size = size or len(data) - position  # 0: to the file's end
        total += size - 8 if kind == b"mdat" else 0
        position += size
    return total


_BYTES_AIMED_AT = sorted({round(2 ** (step / 512)) for step in range(6 * 512, 26 * 512)})

BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("jpeg", "JPEG", ".jpg", _jpeg, range(1, 101), "quality {}", feature="jpg"),
        Baseline("jpeg2000", "JPEG 2000", ".j2k", _jpeg2000, _BYTES_AIMED_AT, "aimed at {} bytes", feature="jpg_2000"),
        Baseline("webp", "WebP", ".webp", _webp, range(101), "quality {}", feature="webp"),
        Baseline("avif", "AVIF", ".avif", _avif, range(101), "quality {}", feature="avif", payload=media_bytes),
        Baseline(
            *("heic", "HEVC intra (for BPG)", ".heic", _heic, range(51, -1, -1), "CRF {}"),
            package="pillow-heif",
            module="pillow_heif",
            payload=media_bytes,
        ),
        # From quality 19 on libjxl no longer halves the picture, and files are up to six steps smaller than before.
        Baseline(
            *("jxl", "JPEG XL", ".jxl", _jxl, range(100), "quality {}"),
            package="pillow-jxl-plugin",
            module="pillow_jxl",
            ripple=8,
        ),
    )
}
