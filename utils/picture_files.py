"""Picture files of any kind as 8-bit sRGB: depth, sign, polarity, planes, alpha, colour keys, profiles."""

import ctypes
import io
import logging
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Lock
from typing import BinaryIO
from warnings import catch_warnings, simplefilter

import numpy as np
from PIL import Image, ImageFile, ImageOps, ImagePalette, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from utils.colour import to_srgb
from utils.errors import PictureError
from utils.files import HEIF_HINT
from utils.limits import MIN_SIDE

# Pillow's globals while a picture is read. Other libraries change some when they are imported.
_PILLOW = (
    (Image, "MAX_IMAGE_PIXELS", None),  # the limit is ours
    (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
    (PngImagePlugin, "MAX_TEXT_CHUNK", 2**24),  # bytes of a text or profile, unpacked
    (TiffImagePlugin, "READ_LIBTIFF", True),  # Pillow's own reader of uncompressed TIFFs mistakes separate planes
)
_NO_RANGE = "have no defined range; convert it to unsigned samples of 8 or 16 bits"
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands of ISO/IEC 23008-12
_SUBFILE_TYPE = 254  # of a TIFF; bit 0: a smaller copy of another picture in the file
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTHS = {"L;2": 2, "L;4": 4}  # by Pillow's name for the samples: those that it scales to 8 bits

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs is in the error that it raises as well


try:  # libtiff writes to stderr what is wrong with a file, and Pillow raises it as well
    _set_libtiffs_handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
    _set_libtiffs_handler.restype, _set_libtiffs_handler.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
except (OSError, AttributeError):  # a Pillow without libtiff, or one that hides it

    def _set_libtiffs_handler(handler: int | None) -> int | None:
        return handler


@contextmanager
def _strict_pillow() -> Iterator[None]:
    saved = [(module, name, getattr(module, name)) for module, name, _ in _PILLOW]
    for module, name, value in _PILLOW:
        setattr(module, name, value)
    handler = _set_libtiffs_handler(None)
    try:
        with catch_warnings():
            simplefilter("ignore")
            yield
    finally:
        _set_libtiffs_handler(handler)
        for module, name, value in saved:
            setattr(module, name, value)


_lock, _entered, _inside = Lock(), ExitStack(), 0


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Pillow without warnings and with `_PILLOW`; its own state comes back when the last thread leaves."""
    global _inside
    with _lock:
        if not _inside:
            _entered.enter_context(_strict_pillow())
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _entered.close()


def read_rgb(file: BinaryIO, max_pixels: int) -> np.ndarray:
    """8-bit sRGB (H, W, 3) of a picture file, alpha composited on white. Raises PictureError, which names no file.

    A PNG that Pillow refuses is tried again without the chunks that its pixels do not need, as libpng would read it.
    """
    first = None
    with strict_pillow():
        for attempt in _attempts(file):
            try:
                return _decoded(attempt, max_pixels)
            except PictureError:
                raise
            except Exception as error:  # damaged files are answered with almost any: OSError, SyntaxError, struct.error
                first = first or error
    raise PictureError(_reason(first, file)) from first


def rgb_of(image: Image.Image, max_pixels: int) -> np.ndarray:
    """The same of an image of Pillow, opened or made, which stays as it is; one that is not loaded is read as its file is."""
    with strict_pillow():
        _check_size(image, max_pixels)
        try:
            if getattr(image, "tile", None) and image.fp and image.tell() == 0:  # a first frame that waits in its file
                with _at_its_place(image.fp) as file:
                    return read_rgb(file, max_pixels)
            image.load()
            upright = image
            with suppress(Exception):
                upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright)
        except PictureError:
            raise
        except Exception as error:
            raise PictureError(f"damaged or cut short ({one_line(error)})") from error


@contextmanager
def _at_its_place(file: BinaryIO) -> Iterator[BinaryIO]:
    """The file, which is afterwards where it was: some of Pillow's readers go on from there."""
    place = file.tell()
    try:
        yield file
    finally:
        file.seek(place)


def _attempts(file: BinaryIO) -> Iterator[BinaryIO]:
    """The file, and a PNG's pixels with less and less beside them."""
    yield file
    if _head(file).startswith(_PNG):
        file.seek(0)
        data = file.read()
        for kept in (b"tRNS", b"iCCP", b"eXIf"), ():
            yield io.BytesIO(_without_metadata(data, kept))


def _decoded(file: BinaryIO, max_pixels: int) -> np.ndarray:
    image = _opened(file)
    _check_size(image, max_pixels)
    if image.format == "EPS":  # Pillow would start Ghostscript
        raise PictureError("an EPS drawing is not read; convert it to PNG")
    if image.format == "TIFF":
        _check_tiff(image)
    elif image.format == "JPEG2000":
        _check_jpeg2000(image, file)
    if image.format == "PNG":
        _load_png(image, file)
    else:
        image.load()
    with suppress(Exception):  # a damaged EXIF block counts as none, the picture is still good
        ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError(f"{width}x{height} is more than the {max_pixels} pixels allowed")
    if min(width, height) < MIN_SIDE:
        raise PictureError(f"{width}x{height} is too small, both sides must be {MIN_SIDE} or more")


def _opened(file: BinaryIO) -> Image.Image:
    file.seek(0)
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if not _is_heif(_head(file)):
            raise
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise PictureError(f"a HEIC picture: no reader{HEIF_HINT}") from None
        register_heif_opener()
        return Image.open(file)


def _head(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(12)


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:] in _HEIF


def _reason(error: Exception, file: BinaryIO) -> str:
    """Words for what Pillow raised."""
    if isinstance(error, MemoryError):
        return "there is not enough memory to read it"
    if not isinstance(error, UnidentifiedImageError):
        return f"damaged or cut short ({one_line(error)})"
    head = _head(file)
    if not head:
        return "empty file"
    if head.startswith(_TIFF):
        return "a TIFF that is damaged or of a kind that is not read (bits, samples, planes); convert it to 8-bit RGB"
    return "not a picture, of an unknown kind, or cut short"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# PNG ------------------------------------------------------------------------------------------------------------------


def _without_metadata(data: bytes, kept: tuple[bytes, ...]) -> bytes:
    """A PNG's critical chunks and, where they are whole, those ancillary ones that are kept (PNG specification, 5.4)."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        name, checksum = data[at + 4 : at + 8], data[end - 4 : end]
        critical = not name[0] & 32
        if critical or (name in kept and zlib.crc32(data[at + 4 : end - 4]).to_bytes(4) == checksum):
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def _load_png(image: Image.Image, file: BinaryIO) -> None:
    """Load a PNG; colour key and profile count where they stand before the pixels (5.6)."""
    samples = image.tile[0].args
    early = {name: image.info.get(name) for name in ("transparency", "icc_profile")}
    image.load()
    image.info = {name: value for name, value in (image.info | early).items() if value is not None}
    if "transparency" in image.info:
        _set_colour_key(image, samples, file)


def _set_colour_key(image: Image.Image, samples: str, file: BinaryIO) -> None:
    """Make the pixels of a PNG's colour key transparent; the key is a sample of the file's own depth (11.3.2.1)."""
    key = image.info["transparency"]
    if bits := _PNG_DEPTHS.get(samples):
        image.info["transparency"] = (key & (2**bits - 1)) * 255 // (2**bits - 1)
    elif samples == "RGB;16B":
        # Pillow keeps the first byte of each sample; read as little-endian, that is the second one.
        second = _opened(file)
        second.tile = [tile._replace(args="RGB;16L") for tile in second.tile]
        second.load()
        values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(second)
        del image.info["transparency"]
        image.putalpha(Image.fromarray(np.uint8(255) * (values != key).any(axis=2)))


# TIFF -----------------------------------------------------------------------------------------------------------------


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """Raise PictureError for samples that have no range, or that Pillow mistakes; mend a palette of 8-bit entries."""
    tags = image.tag_v2
    if tags.get(_SUBFILE_TYPE, 0) & 1:
        raise PictureError("its first picture is a thumbnail, as in a camera's raw file; convert it to 8-bit RGB")
    if max(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))) == 3:
        raise PictureError(f"floating-point samples {_NO_RANGE}")
    if max(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))) > 1:
        raise PictureError(f"signed samples {_NO_RANGE}")
    if max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 16:
        raise PictureError(f"32-bit samples {_NO_RANGE}")
    if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and image.mode in ("LA", "La", "PA"):
        raise PictureError("grey and alpha in separate planes are not read; store them together")
    colours = tags.get(TiffImagePlugin.COLORMAP)
    if colours and max(colours) < 256:  # against TIFF 6.0, which has 16 bits; libtiff reads them so too
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))


def _range_of_grey(image: Image.Image) -> tuple[int, bool]:
    """The largest value of a mode of more than 8 bits, and whether it is black."""
    if image.format != "TIFF":
        return 65535, False
    # Pillow does not scale 12 bits to 16, and inverts samples up to 8 bits alone.
    bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    return 2**bits - 1, image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0) == 0


# JPEG 2000 ------------------------------------------------------------------------------------------------------------


def _check_jpeg2000(image: Image.Image, file: BinaryIO) -> None:
    """Raise PictureError for depths that Pillow mistakes: colours of more than 8 bits overflow, and white becomes black.

    Take the profile, which Pillow leaves in the header (ISO/IEC 15444-1, A.5.1 and I.5.3.3).
    """
    file.seek(0)
    head, _, size = file.read().partition(b"\xff\x4f\xff\x51")  # SOC, SIZ
    count = int.from_bytes(size[36:38])
    depths = {1 + (depth & 127) for depth in size[38 : 38 + 3 * count : 3]}
    if depths != {8} and image.mode != "I;16":
        bits = " and ".join(map(str, sorted(depths)))
        raise PictureError(f"JPEG 2000 with samples of {bits} bits is not read; convert it to 8 bits")
    at = head.find(b"colr")
    if at >= 0 and head[at + 4] in (2, 3):  # an ICC profile
        image.info["icc_profile"] = head[at + 7 : at - 4 + int.from_bytes(head[at - 4 : at])]


# Modes ----------------------------------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image) -> np.ndarray:
    """8-bit sRGB (H, W, 3) of a loaded image of any mode."""
    if image.mode == "F":
        raise PictureError(f"floating-point samples {_NO_RANGE}")
    if image.mode.startswith("I"):
        image = _grey_of_16_bits(image)
    if not image.has_transparency_data:
        mode = {"1": "L", "L": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(image.mode, "RGB")
        return np.asarray(to_srgb(image if image.mode == mode else image.convert(mode)))
    grey = image.mode in ("1", "L", "LA", "La")
    image = image.convert("LA" if grey else "RGBA")
    alpha = np.asarray(image.getchannel("A")).astype(np.uint16)[..., None]
    colour = np.asarray(to_srgb(image.convert("L" if grey else "RGB"))).astype(np.uint16)
    # On white, the light that is missing scales with alpha; the sum stays below 2^16.
    missing = ((255 - colour) * alpha + 127) // 255
    return (255 - missing).astype(np.uint8)


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """Grey of mode L, or LA where there is a colour key, of up to 16 bits in a 16- or a 32-bit mode: round(v / largest * 255)."""
    values = np.asarray(image).astype(np.int64)
    largest, inverted = _range_of_grey(image)
    if values.min() < 0 or values.max() > largest:
        raise PictureError(f"32-bit samples {_NO_RANGE}")
    grey = (values * 255 + largest // 2) // largest
    result = Image.fromarray((255 - grey if inverted else grey).astype(np.uint8))
    result.info = {name: value for name, value in image.info.items() if name == "icc_profile"}
    if "transparency" in image.info:
        result.putalpha(Image.fromarray(np.uint8(255) * (values != image.info["transparency"])))
    return result
