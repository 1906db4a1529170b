"""The `.dfo` file: header and coded sections to bytes and back; refuses what it does not know.

    magic         3 bytes   b"DfO"
    version       1 byte    1
    flags         1 byte    bit 0: base at fixed length; bit 1: residual sections follow; bit 2: base in passes, not
                            together with bit 0; bit 3: the picture is coded at a smaller size; others zero
    fingerprint   4 bytes   of the weights that wrote the file
    height        varint    of the source picture, in pixels
    width         varint
    scale         1 byte    with bit 3: the sixteenths of both sides that are coded, 4 to 15
    base length   varint    in bytes
    base                    see entropy_coding; in passes, index_model
    CRC-32        4 bytes   big endian, over everything before it

and with bit 1, after what a preview needs,

    code          1 byte    of the level, 1 to 255
    hyper length  varint    in bytes
    length        varint    of the residual, in bytes
    hyper, residual         see entropy_coding
    CRC-32        4 bytes   big endian, over everything before it

A varint is LEB128, unsigned, in its shortest form. A 768×512 picture has 19 bytes beside its base, 28 with a residual.
"""

import zlib
from dataclasses import dataclass

from utils.errors import BitstreamError
from utils.limits import MIN_SIDE

MAGIC = b"DfO"
VERSION = 1
FINGERPRINT_BYTES = 4
MAX_SIDE = 1 << 20
LEAST_RESIDUAL = 9  # bytes that the shortest residual adds: code, two lengths, two sections of a byte, CRC-32
CELL = 16  # pixels per latent position, along each side
LEAST_SCALE, WHOLE = 4, 16  # sixteenths of both sides that are coded

_FLAG_FIXED_LENGTH = 1
_FLAG_RESIDUAL = 2
_FLAG_PASSES = 4
_FLAG_SCALED = 8
_FLAGS_AT = len(MAGIC) + 1
_FINGERPRINT_AT = _FLAGS_AT + 1
_SIZES_AT = _FINGERPRINT_AT + FINGERPRINT_BYTES
_CRC_BYTES = 4
_MAX_VARINT_BYTES = 5


@dataclass(frozen=True)
class CodedResidual:
    """The sections above the base: code of the level, 1 to 255, and the coded n_z and n, at least 1 byte each."""

    code: int
    hyper: bytes
    symbols: bytes

    def __post_init__(self) -> None:
        if not 1 <= self.code <= 255:
            raise BitstreamError(f"the code of the level is {self.code}, not 1 to 255: the file is damaged")
        if not self.hyper or not self.symbols:
            raise BitstreamError("a section of the residual is empty: the file is damaged")


@dataclass(frozen=True)
class CodedPicture:
    """The content of one file.

    Attributes:
        height, width: of the source picture, in pixels, each 16 to 2^20.
        fingerprint: 4 bytes that name the weights.
        base: the section with the indices of the base, at least 1 byte.
        fixed_length: whether the base is at fixed length rather than range-coded.
        residual: the sections above the base; None for the base alone.
        in_passes: whether the base is range-coded in passes, by the index model, rather than with one table.
        scale: sixteenths of both sides that are coded, LEAST_SCALE to WHOLE; the decoder enlarges what it decodes.
    Raises:
        BitstreamError: a size or a scale outside the range, an empty base, or one that is coded in two ways.
    """

    height: int
    width: int
    fingerprint: bytes
    base: bytes
    fixed_length: bool
    residual: CodedResidual | None = None
    in_passes: bool = False
    scale: int = WHOLE

    def __post_init__(self) -> None:
        if not (MIN_SIDE <= self.height <= MAX_SIDE and MIN_SIDE <= self.width <= MAX_SIDE):
            raise BitstreamError(
                f"a picture of {self.width}×{self.height} pixels cannot be stored: "
                f"each side must be {MIN_SIDE} to {MAX_SIDE}"
            )
        if not LEAST_SCALE <= self.scale <= WHOLE:
            raise BitstreamError(f"the scale is {self.scale} sixteenths, not {LEAST_SCALE} to {WHOLE}")
        if not self.base:
            raise BitstreamError("the base section is empty: there is nothing to decode")
        if self.fixed_length and self.in_passes:
            raise BitstreamError("the base is marked as at fixed length and as coded in passes: the file is damaged")

    @property
    def header_bytes(self) -> int:
        """Bytes of the file that are neither sections nor checks."""
        return len(_header(self)) + len(_residual_header(self.residual))

    @property
    def check_bytes(self) -> int:
        """Bytes of the file that are checksums."""
        return _CRC_BYTES * (2 if self.residual else 1)

    @property
    def section_bytes(self) -> dict[str, int]:
        """Bytes of every coded section."""
        above = {"hyper": len(self.residual.hyper), "residual": len(self.residual.symbols)} if self.residual else {}
        return {"base": len(self.base)} | above

    @property
    def section_bpp(self) -> float:
        """B_eta: bits of the coded sections per coded pixel of the latent's 16×16 cells; the B of DiffO's Eq. 11."""
        h, w = self.latent_size
        return 8 * sum(self.section_bytes.values()) / (CELL**2 * h * w)

    @property
    def coded_size(self) -> tuple[int, int]:
        """Height and width that are coded, in pixels."""
        return scaled(self.height, self.scale), scaled(self.width, self.scale)

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latent: one index per 16×16 coded pixels, partial blocks included."""
        height, width = self.coded_size
        return -(-height // CELL), -(-width // CELL)


def scaled(side: int, sixteenths: int) -> int:
    """A side of a picture at a scale: rounded to pixels, halves up, and at least MIN_SIDE."""
    return max(MIN_SIDE, (side * sixteenths + WHOLE // 2) // WHOLE)


def noise_seed(base: bytes) -> int:
    """Seed of the decoder's noise, a uint32: the CRC-32 of the base section."""
    return zlib.crc32(base)


def pack(picture: CodedPicture) -> bytes:
    """The whole file."""
    data = _sealed(_header(picture) + picture.base)
    residual = picture.residual
    return _sealed(data + _residual_header(residual) + residual.hyper + residual.symbols) if residual else data


def unpack(data: bytes, preview: bool = False) -> CodedPicture:
    """Inverse of `pack`; accepts exactly what `pack` can write.

    Args:
        preview: take the base alone, and accept any end of the file after its checksum.
    Raises:
        BitstreamError: anything else, with one line that says what is wrong and what it means.
    """
    _check_kind(data)
    height, at = _read_varint(data, _SIZES_AT)
    width, at = _read_varint(data, at)
    scale, at = _read_scale(data, at)
    base_bytes, at = _read_varint(data, at)
    end = at + base_bytes + _CRC_BYTES
    _check_layer(data, end)
    flags = data[_FLAGS_AT]
    if flags & ~(_FLAG_FIXED_LENGTH | _FLAG_RESIDUAL | _FLAG_PASSES | _FLAG_SCALED):
        raise BitstreamError(f"this file uses features (flags {flags:#04x}) of a newer program: update the program")
    residual = None
    if flags & _FLAG_RESIDUAL and not preview:
        residual, end = _read_residual(data, end)
    if len(data) > end and not (flags & _FLAG_RESIDUAL and preview):
        raise BitstreamError(f"{len(data) - end} bytes follow the end of the file's {end}: remove what was appended")
    return CodedPicture(
        height=height,
        width=width,
        fingerprint=bytes(data[_FINGERPRINT_AT:_SIZES_AT]),
        base=bytes(data[at : at + base_bytes]),
        fixed_length=bool(flags & _FLAG_FIXED_LENGTH),
        residual=residual,
        in_passes=bool(flags & _FLAG_PASSES),
        scale=scale,
    )


def _read_scale(data: bytes, at: int) -> tuple[int, int]:
    """The scale, which a file without its flag does not have, and the position after it."""
    if not data[_FLAGS_AT] & _FLAG_SCALED:
        return WHOLE, at
    if at >= len(data):
        raise _Cut(f"the file is cut within its header, after {len(data)} bytes")
    if data[at] == WHOLE:
        raise BitstreamError("the file is marked as coded at a smaller size, and its scale is the whole: it is damaged")
    return data[at], at + 1


def _read_residual(data: bytes, at: int) -> tuple[CodedResidual, int]:
    """The sections above the base, which begin at `at`, and where the file ends."""
    try:
        hyper_bytes, start = _read_varint(data, at + 1)
        residual_bytes, start = _read_varint(data, start)
        middle = start + hyper_bytes
        end = middle + residual_bytes
        _check_layer(data, end + _CRC_BYTES)
    except _Cut as error:
        raise BitstreamError(
            f"the file is cut after {len(data)} bytes, within its residual; its base is whole, and a preview decodes that "
            "(preview=True, --preview)"
        ) from error
    return CodedResidual(data[at], bytes(data[start:middle]), bytes(data[middle:end])), end + _CRC_BYTES


def _header(picture: CodedPicture) -> bytes:
    marks = {
        _FLAG_FIXED_LENGTH: picture.fixed_length,
        _FLAG_RESIDUAL: picture.residual,
        _FLAG_PASSES: picture.in_passes,
        _FLAG_SCALED: picture.scale != WHOLE,
    }
    flags = sum(flag for flag, present in marks.items() if present)
    sides = _varint(picture.height) + _varint(picture.width)
    scale = bytes((picture.scale,)) if picture.scale != WHOLE else b""
    return MAGIC + bytes((VERSION, flags)) + picture.fingerprint + sides + scale + _varint(len(picture.base))


def _residual_header(residual: CodedResidual | None) -> bytes:
    if residual is None:
        return b""
    return bytes((residual.code,)) + _varint(len(residual.hyper)) + _varint(len(residual.symbols))


def _check_kind(data: bytes) -> None:
    """Magic and version: is this a file that this program can read?"""
    if not data:
        raise BitstreamError("the file is empty")
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise BitstreamError("this is not a .dfo file: it does not begin with 'DfO'")
    if len(data) <= len(MAGIC):
        raise _Cut(f"the file is cut within its header, after {len(data)} bytes")
    if (version := data[len(MAGIC)]) != VERSION:
        raise BitstreamError(
            f"this file has format version {version}; this program reads {VERSION}: "
            "update the program, unless the file is damaged"
        )


def _check_layer(data: bytes, size: int) -> None:
    """Length and CRC of the first `size` bytes, the CRC among them."""
    if len(data) < size:
        raise _Cut(f"the file is cut after {len(data)} bytes of {size}, or its header is damaged")
    if _sealed(data[: size - _CRC_BYTES]) != data[:size]:
        raise BitstreamError("the checksum does not match: the file is damaged")


def _sealed(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(_CRC_BYTES, "big")


def _varint(value: int) -> bytes:
    """Seven bits per byte, least significant first; the top bit says that more follow."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at` and the position after it."""
    value = 0
    for i in range(_MAX_VARINT_BYTES):
        if at + i >= len(data):
            raise _Cut(f"the file is cut within its header, after {len(data)} bytes")
        byte = data[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte <= 0x7F:
            if byte == 0 and i > 0:
                raise BitstreamError("a number in the header is not in its shortest form: the file is damaged")
            return value, at + i + 1
    raise BitstreamError("a number in the header is too large: the file is damaged")


class _Cut(BitstreamError):
    """A file that ends before it should."""
