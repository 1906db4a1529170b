"""The codec as functions of a program: pictures of every kind in, bytes out, and back.

    codec = load_codec()                                # the release that ships, or a folder: load_codec("weights/mine")
    data = codec.compress("photo.jpg", quality=40)      # bytes, the content of a `.dfo` file
    image = codec.decompress(data)                      # uint8 tensor, 3 x H x W

From other folders `torch.hub.load(FOLDER, "diffo", source="local")` gives the same object (`hubconf.py`).
"""

import math
import os
from collections.abc import Sequence
from functools import partial
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coding import budget, ledger
from coding.options import DECODERS, SCALES
from models.bitstream import VERSION, WHOLE, unpack
from models.codec import Codec
from models.records import Sampling
from models.released import SMALL, load_release
from models.speed.choices import CUDA_PATHS, PRECISIONS, Precision
from models.speed.fast import prepare
from utils.distributed import local_device
from utils.errors import BitstreamError, DiffoError, PictureError
from utils.images import from_pillow, read_image
from utils.limits import MAX_PIXELS, MIN_SIDE

Bytes = bytes | bytearray | memoryview  # and whatever else has Python's buffer interface: mmap, array, NumPy's arrays
Picture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor

WANTED = (
    "a picture is a path, a PIL image, a NumPy array H x W x 3 or a tensor 3 x H x W, RGB (H x W: grey), "
    "uint8 or floating point in [0, 1]"
)


def load_codec(
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    max_pixels: int = MAX_PIXELS,
    decoder: str = "full",
    precision: Precision = "auto",
    without: Sequence[str] = (),
    rdo: float | None = None,
) -> "ImageCodec":
    """The codec of a release.

    Args:
        weights: release folder (`python -m release` makes one); None for the small one that ships.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`, which takes CUDA where it is.
        max_pixels: pictures that have more, and files that claim more, are refused.
        decoder: `full`, D, or `light`, the light decoder of a release that has one; files are the same.
        precision: of the networks: `float32`, `bfloat16`, or `auto`, which takes bfloat16 where the hardware computes in
            it and it pays. Files read with either are the same integers.
        without: fast paths of CUDA to leave out, of `fused_norm`, which is a switch of the process, and `graphs`.
        rdo: weight of their bits when `compress` chooses indices of the base (`Codec.indices`); 0 takes the nearest codes,
            and so does None with weights that have no index model, else `models.codec.RATE_WEIGHT`.
    Raises:
        CheckpointError: no release there, a damaged one, files of several, no light decoder, or no index model for
        `rdo`. DiffoError: no such device. ValueError: no such decoder, precision, fast path or weight.
    """
    named = [("decoder", decoder, DECODERS), ("precision", precision, PRECISIONS)]
    for name, value, allowed in [*named, *(("without", path, CUDA_PATHS) for path in without)]:
        if value not in allowed:
            raise ValueError(f"{name} {value!r}: {', '.join(allowed)}")
    if rdo is not None and not 0 <= rdo < math.inf:
        raise ValueError(f"rdo {rdo}: a weight from 0, where indices are the nearest")
    model = load_release(SMALL if weights is None else Path(weights), local_device(str(device), "device"), decoder)
    model.max_pixels = max_pixels
    if rdo is not None:
        model.choose_by_rate(rdo)
    return ImageCodec(prepare(model, precision, without))


class ImageCodec:
    """A released codec. Everything that can be wrong with a picture, a file or a budget raises a `DiffoError`.

    Attributes:
        model: networks, tables and levels (`models.codec.Codec`), for who wants more than files.
        Error: DiffoError, for callers that cannot import `utils.errors`.
    """

    Error = DiffoError

    def __init__(self, model: Codec):
        self.model = model

    def compress(
        self,
        image: Picture,
        quality: float | None = None,
        target_bpp: float | None = None,
        max_bytes: int | None = None,
        scale: float | None = None,
    ) -> bytes:
        """Code a picture, sides from 16 pixels; without further arguments as the base alone.

        Args:
            image: path, PIL image, NumPy array (H x W x 3 or H x W) or tensor (3 x H x W or H x W); arrays and tensors
                uint8, grey values 0 to 255, or floating point in [0, 1].
            quality: 0, the base alone, to 100, any number between. Or a budget that the largest file within is written to:
            target_bpp: bits per pixel of the picture, at most. max_bytes: bytes of the file, at most.
            scale: share of both sides that is coded, a multiple of 1/16 from 1/4; the decoder enlarges what it decodes. None:
            1, or, with a budget, what suits that (`coding.budget.fit_scaled`).
        Returns:
            The content of a `.dfo` file.
        Raises:
            PictureError: not a picture, too small or too large. BudgetError: below the smallest file of the picture.
            CheckpointError: weights that have no residual, with a quality above 0. ValueError: arguments that contradict
            each other or are out of range. TypeError: one that is no number.
        """
        _require_one(quality=quality, target_bpp=target_bpp, max_bytes=max_bytes)
        if scale is not None and scale not in SCALES:
            raise ValueError(f"scale {scale}: a multiple of 1/16 from 0.25 to 1")
        code = self.model.level_code(quality or 0)
        picture = as_picture(image, self.model.max_pixels)
        if target_bpp is not None:
            max_bytes = budget.bytes_of_bpp(target_bpp, *picture.shape[1:])
        if max_bytes is not None and scale is None:
            return budget.fit_scaled(self.model, max_bytes, partial(self.model.analyse, picture)).data
        analysed = self.model.analyse(picture, round(WHOLE * (scale or 1)))
        return (
            self.model.write(analysed, code) if max_bytes is None else budget.fit(self.model, analysed, max_bytes).data
        )

    def decompress(self, data: Bytes, preview: bool = False, texture: float = 1.0) -> Tensor:
        """Decode a file: anything bytes-like -> uint8 tensor 3 x H x W, RGB, on the CPU.

        Args:
            preview: the base alone, also of a file that was cut anywhere behind it.
            texture: share of the weights' texture that is added, 0 for none, up to 2.
        Raises:
            BitstreamError: not a file of this codec, damaged or cut. CheckpointError: written with other weights.
            ValueError: texture out of range. TypeError: it is no number.
        """
        _require_number("texture", texture)
        return self.model.decode(as_bytes(data), Sampling(texture=texture), preview).image

    def info(self, data: Bytes) -> dict[str, int | float | str]:
        """Sizes of a file and where its bits go, without decoding the picture.

        Returns:
            `version` of the format, `weights` (the release's fingerprint), `width`, `height`, `scale`, `bytes`, `bpp`, `code` of the
            level (0: the base alone) and the bits of every part, `header_bits` to `check_bits`, 8 x `bytes` together. If it
            was written with these weights, also `estimated_bits` (what the tables' probabilities come to) and
            `fixed_length_base_bits`.
        Raises:
            BitstreamError: not a file of this codec, damaged or cut.
        """
        data = as_bytes(data)
        file = unpack(data)
        facts = {"version": VERSION, "weights": file.fingerprint.hex()} | ledger.ledger(file)
        own = file.fingerprint == self.model.fingerprint
        return facts | (ledger.beside(self.model, self.model.read(data)) if own else {})


def _require_one(**asked: float | None) -> None:
    """Raise ValueError or TypeError unless at most one size is asked for, and that is a number that can be."""
    named = {name: value for name, value in asked.items() if value is not None}
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} contradict each other: give one of them")
    for name, value in named.items():
        _require_number(name, value)
        if name == "target_bpp" and not 0 < value < math.inf:
            raise ValueError(f"target_bpp {value}: bits per pixel, above 0")
        if name == "max_bytes" and not 1 <= value < math.inf:
            raise ValueError(f"max_bytes {value}: bytes of the file, from 1")


def _require_number(name: str, value: object) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name} {value!r}: a number is wanted")


def as_bytes(data: Bytes) -> bytes:
    """The bytes of anything that has some. Raises BitstreamError."""
    try:
        return memoryview(data).tobytes()
    except TypeError:
        raise BitstreamError(
            f"a {type(data).__name__} came; a file is given as its bytes: bytes, bytearray, memoryview, ... "
            "(Path(name).read_bytes())"
        ) from None


def as_picture(image: Picture, max_pixels: int) -> Tensor:
    """A picture of every kind as a uint8 tensor (3, H, W), RGB, that shares no memory with it. Raises PictureError."""
    if isinstance(image, str | os.PathLike):
        return read_image(image, max_pixels)
    if isinstance(image, Image.Image):
        return from_pillow(image, getattr(image, "filename", "") or "the PIL image", max_pixels)
    if not isinstance(image, np.ndarray | Tensor):
        raise PictureError(f"a {type(image).__name__} came; {WANTED}")
    came = (
        f"{'a tensor' if isinstance(image, Tensor) else 'an array'} {' x '.join(map(str, image.shape))}, {image.dtype}"
    )
    values = image
    if isinstance(image, Tensor):
        values = (image.detach().float() if image.is_floating_point() else image.detach()).cpu().numpy()  # no bfloat16
        values = np.moveaxis(values, 0, 2) if values.ndim == 3 else values
    floating = values.dtype.kind == "f"
    if values.ndim not in (2, 3) or values.shape[2:] not in ((), (3,)) or not (floating or values.dtype == np.uint8):
        raise PictureError(f"{came}, came; {WANTED}")
    height, width = values.shape[:2]
    if min(height, width) < MIN_SIDE or height * width > max_pixels:
        raise PictureError(f"{came}, came; a picture has sides from {MIN_SIDE} and at most {max_pixels:,} pixels")
    if floating:
        if not (values.min() >= 0 and values.max() <= 1):
            raise PictureError(f"{came}, came, with values from {values.min():g} to {values.max():g}; {WANTED}")
        values = np.rint(values * 255).astype(np.uint8)
    grey = values.ndim == 2
    return torch.from_numpy(
        np.array(np.broadcast_to(values, (3, height, width)) if grey else np.moveaxis(values, 2, 0))
    )
