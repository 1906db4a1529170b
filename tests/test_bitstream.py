import dataclasses
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.bitstream import CodedPicture, noise_seed, pack, unpack
from utils.errors import BitstreamError

SMALL = CodedPicture(height=30, width=200, fingerprint=b"\xde\xad\xbe\xef", base=bytes(range(26)), fixed_length=True)
GOLDEN_FILE = "44664f0101deadbeef1ec8011a000102030405060708090a0b0c0d0e0f10111213141516171819" + "a43dbb7b"

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)
pictures = st.builds(
    CodedPicture,
    height=st.integers(16, 2**20),
    width=st.integers(16, 2**20),
    fingerprint=st.binary(min_size=4, max_size=4),
    base=st.binary(min_size=1, max_size=300),
    fixed_length=st.booleans(),
)


def resealed(content: bytes) -> bytes:
    """`content` with a CRC that matches it: what a foreign or newer program may have written."""
    return content + zlib.crc32(content).to_bytes(4, "big")


def edited(position: int, replacement: bytes, length: int = 1) -> bytes:
    content = pack(SMALL)[:-4]
    return resealed(content[:position] + replacement + content[position + length :])


def test_golden_file_pins_the_format():
    assert pack(SMALL).hex() == GOLDEN_FILE
    assert unpack(bytes.fromhex(GOLDEN_FILE)) == SMALL


@quick
@given(picture=pictures)
def test_any_picture_round_trips(picture):
    data = pack(picture)
    assert unpack(data) == picture
    assert len(data) == picture.header_bytes + sum(picture.section_bytes.values()) + picture.check_bytes


@quick
@given(data=st.binary(max_size=60))
def test_garbage_is_refused(data):
    for garbage in (data, b"DfO" + data, b"DfO\x01" + data, b"DfO\x01\x00" + data):
        with pytest.raises(BitstreamError) as error:
            unpack(garbage)
        assert "\n" not in str(error.value)


@quick
@given(tail=st.binary(max_size=40), flags=st.integers(0, 255), version=st.integers(0, 255))
def test_garbage_with_a_valid_crc_is_refused_or_is_what_pack_writes(tail, flags, version):
    data = resealed(b"DfO" + bytes([version, flags]) + tail)
    try:
        picture = unpack(data)
    except BitstreamError:
        return
    assert pack(picture) == data


def test_every_mutation_of_one_byte_is_refused():
    data = pack(SMALL)
    for position in range(len(data)):
        for value in set(range(256)) - {data[position]}:
            with pytest.raises(BitstreamError):
                unpack(data[:position] + bytes([value]) + data[position + 1 :])


def test_every_truncation_is_refused_as_cut():
    data = pack(SMALL)
    with pytest.raises(BitstreamError, match="the file is empty"):
        unpack(b"")
    for size in range(1, len(data)):
        with pytest.raises(BitstreamError, match=f"cut .*after {size} bytes"):
            unpack(data[:size])


def test_every_extension_is_refused():
    data = pack(SMALL)
    for extra in [bytes([value]) for value in range(256)] + [b"\0" * 7, data]:
        with pytest.raises(BitstreamError, match=f"^{len(extra)} bytes follow the end of the file's {len(data)}"):
            unpack(data + extra)


@pytest.mark.parametrize(
    ("height", "width", "base_bytes", "expected"),
    [(16, 16, 1, 16), (127, 127, 64, 16), (512, 768, 1536, 19), (1400, 2048, 11264, 19), (2**20, 2**20, 5, 20)],
)
def test_header_sizes(height, width, base_bytes, expected):
    picture = CodedPicture(height, width, b"abcd", bytes(base_bytes), False)
    assert picture.header_bytes + picture.check_bytes == expected
    assert len(pack(picture)) == expected + base_bytes


@pytest.mark.parametrize(
    ("height", "width", "latent"), [(16, 16, (1, 1)), (17, 32, (2, 2)), (512, 768, (32, 48)), (33, 31, (3, 2))]
)
def test_latent_size(height, width, latent):
    assert CodedPicture(height, width, b"abcd", b"x", False).latent_size == latent


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not a .dfo file"),
        (b"Df0" + pack(SMALL)[3:], "not a .dfo file"),
        (b"X", "not a .dfo file"),
        (edited(3, b"\x02"), "version 2; this program reads up to 1: update"),
        (edited(3, b"\xff"), "version 255; this program reads up to 1: update"),
        (edited(3, b"\x00"), "version 0, which does not exist"),
        (pack(SMALL)[:3] + b"\x02" + pack(SMALL)[4:], "damaged"),
        (edited(4, b"\x02"), "cut after 43 bytes, within its residual"),
        (edited(4, b"\x03"), "cut after 43 bytes, within its residual"),
        (edited(4, b"\x04"), "features .flags 0x04. of a newer program: update"),
        (edited(4, b"\x83"), "newer program: update"),
        (pack(SMALL)[:4] + b"\x03" + pack(SMALL)[5:], "damaged"),
        (edited(9, b"\x0f"), "200×15 pixels cannot be stored: each side must be 16 to 1048576"),
        (edited(9, b"\x00"), "200×0 pixels"),
        (edited(9, b"\x81\x80\x40"), "200×1048577 pixels"),
        (edited(9, b"\x9e\x00"), "shortest form"),
        (edited(12, b"\x9a\x80\x00"), "shortest form"),
        (edited(9, b"\x80\x80\x80\x80\x80\x01"), "too large"),
        (edited(12, b"\x1b"), "cut after 43 bytes of 44, or its header is damaged"),
        (edited(12, b"\x00", 27), "base section is empty"),
        (pack(SMALL)[:20] + b"\xff" + pack(SMALL)[21:], "checksum does not match: the file is damaged"),
    ],
)
def test_refusals_say_what_is_wrong(data, message):
    with pytest.raises(BitstreamError, match=message) as error:
        unpack(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"height": 15}, {"width": 2**20 + 1}, {"height": 0}, {"width": -5}, {"base": b""}])
def test_what_cannot_be_stored_is_refused(change):
    with pytest.raises(BitstreamError):
        dataclasses.replace(SMALL, **change)


def test_a_fingerprint_has_four_bytes():
    with pytest.raises(ValueError, match="4 bytes, not 3"):
        dataclasses.replace(SMALL, fingerprint=b"abc")


def test_noise_seed_is_the_crc_of_the_base():
    assert noise_seed(b"123456789") == 0xCBF43926
    assert 0 <= noise_seed(bytes(1000)) < 2**32
