"""The `.dfo` file: header and coded sections to bytes and back; refuses what it does not know.

    magic         3 bytes   b"DfO"
    version       1 byte    1
    flags         1 byte    bit 0: base at fixed length; bit 1: residual sections follow (reserved); others zero
    fingerprint   4 bytes   of the weights that wrote the file
    height        varint    of the source picture, in pixels
    width         varint
    base length   varint    in bytes
    base                    see entropy_coding
    CRC-32        4 bytes   big endian, over everything before it

Residual sections will follow this CRC, so that the base can be trusted without them. A varint is LEB128, unsigned, in
its shortest form. A 768×512 picture has 19 bytes beside its base.
"""

import zlib
from dataclasses import dataclass

from utils.errors import BitstreamError

MAGIC = b"DfO"
VERSION = 1
FINGERPRINT_BYTES = 4
MIN_SIDE, MAX_SIDE = 16, 1 << 20
LATENT_STRIDE = 16

_FLAG_FIXED_LENGTH = 1
_FLAG_RESIDUAL = 2
_FLAGS_AT = len(MAGIC) + 1
_FINGERPRINT_AT = _FLAGS_AT + 1
_SIZES_AT = _FINGERPRINT_AT + FINGERPRINT_BYTES
_CRC_BYTES = 4
_MAX_VARINT_BYTES = 5


@dataclass(frozen=True)
class CodedPicture:
    """What one file says.

    Attributes:
        height, width: of the source picture, in pixels, each 16 to 2^20.
        fingerprint: 4 bytes that name the weights.
        base: the section with the indices of the base, at least 1 byte.
        fixed_length: whether the base is at fixed length rather than range-coded.
    Raises:
        BitstreamError: a size outside the range, or an empty base.
        ValueError: a fingerprint that is not 4 bytes.
    """

    height: int
    width: int
    fingerprint: bytes
    base: bytes
    fixed_length: bool

    def __post_init__(self) -> None:
        if not (MIN_SIDE <= self.height <= MAX_SIDE and MIN_SIDE <= self.width <= MAX_SIDE):
            raise BitstreamError(
                f"a picture of {self.width}×{self.height} pixels cannot be stored: "
                f"each side must be {MIN_SIDE} to {MAX_SIDE}"
            )
        if not self.base:
            raise BitstreamError("the base section is empty: there is nothing to decode")
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(f"the fingerprint must be {FINGERPRINT_BYTES} bytes, not {len(self.fingerprint)}")

    @property
    def header_bytes(self) -> int:
        """Bytes of the file that are not the base: header and CRC."""
        return len(_header(self)) + _CRC_BYTES

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latent: one index per 16×16 pixels, partial blocks included."""
        return -(-self.height // LATENT_STRIDE), -(-self.width // LATENT_STRIDE)


def noise_seed(base: bytes) -> int:
    """Seed of the decoder's noise, a uint32: the CRC-32 of the base section."""
    return zlib.crc32(base)


def pack(picture: CodedPicture) -> bytes:
    """The whole file."""
    content = _header(picture) + picture.base
    return content + _crc(content)


def unpack(data: bytes) -> CodedPicture:
    """Inverse of `pack`; accepts exactly what `pack` can write.

    Raises:
        BitstreamError: anything else, with one line that says what is wrong and what it means.
    """
    _check_kind(data)
    height, at = _read_varint(data, _SIZES_AT)
    width, at = _read_varint(data, at)
    base_bytes, at = _read_varint(data, at)
    end = at + base_bytes
    _check_base(data, end + _CRC_BYTES)
    fixed_length = _read_flags(data)
    if len(data) > end + _CRC_BYTES:
        extra = len(data) - end - _CRC_BYTES
        raise BitstreamError(f"{extra} bytes follow the end of the file's {end + _CRC_BYTES}: remove what was appended")
    return CodedPicture(
        height=height,
        width=width,
        fingerprint=bytes(data[_FINGERPRINT_AT:_SIZES_AT]),
        base=bytes(data[at:end]),
        fixed_length=fixed_length,
    )


def _header(picture: CodedPicture) -> bytes:
    flags = _FLAG_FIXED_LENGTH if picture.fixed_length else 0
    sizes = (picture.height, picture.width, len(picture.base))
    return MAGIC + bytes((VERSION, flags)) + picture.fingerprint + b"".join(map(_varint, sizes))


def _check_kind(data: bytes) -> None:
    """Magic and version: is this a file that this program can read?"""
    if not data:
        raise BitstreamError("the file is empty")
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise BitstreamError("this is not a .dfo file: it does not begin with 'DfO'")
    if len(data) <= len(MAGIC):
        raise _cut_in_header(data)
    version = data[len(MAGIC)]
    if version > VERSION:
        raise BitstreamError(
            f"this file has format version {version}; this program reads up to {VERSION}: "
            "update the program, unless the file is damaged"
        )
    if version != VERSION:
        raise BitstreamError(f"this file has format version {version}, which does not exist: it is damaged")


def _read_flags(data: bytes) -> bool:
    """Whether the base is at fixed length; refuses all other flags. The CRC must have been checked."""
    flags = data[_FLAGS_AT]
    if flags & ~(_FLAG_FIXED_LENGTH | _FLAG_RESIDUAL):
        raise BitstreamError(f"this file uses features (flags {flags:#04x}) of a newer program: update the program")
    if flags & _FLAG_RESIDUAL:
        raise BitstreamError("this file has residual sections, which this version cannot decode: update the program")
    return bool(flags & _FLAG_FIXED_LENGTH)


def _check_base(data: bytes, size: int) -> None:
    """Length and CRC of header and base, which should have `size` bytes together."""
    if len(data) < size:
        raise BitstreamError(f"the file is cut after {len(data)} bytes of {size}, or its header is damaged")
    if not _crc_matches(data[:size]):
        raise BitstreamError("the checksum does not match: the file is damaged")


def _crc(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_CRC_BYTES, "big")


def _crc_matches(data: bytes) -> bool:
    return _crc(data[:-_CRC_BYTES]) == data[-_CRC_BYTES:]


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
            raise _cut_in_header(data)
        byte = data[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte <= 0x7F:
            if byte == 0 and i > 0:
                raise BitstreamError("a number in the header is not in its shortest form: the file is damaged")
            return value, at + i + 1
    raise BitstreamError("a number in the header is too large: the file is damaged")


def _cut_in_header(data: bytes) -> BitstreamError:
    return BitstreamError(f"the file is cut within its header, after {len(data)} bytes")
