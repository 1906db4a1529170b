"""Files: the base comes first and stands alone, residual sections follow, a checksum closes each of both layers."""

import dataclasses
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.bitstream import LEAST_SCALE, WHOLE, CodedPicture, CodedResidual, noise_seed, pack, unpack
from utils.errors import BitstreamError

RESIDUAL = CodedResidual(code=200, hyper=b"\x01\x02\x03", symbols=bytes(range(9)))
BASE = CodedPicture(height=30, width=200, fingerprint=b"\xde\xad\xbe\xef", base=bytes(range(26)), fixed_length=True)
BOTH = CodedPicture(30, 200, b"\xde\xad\xbe\xef", b"base", False, RESIDUAL)
BASE_END = 13 + 4 + 4  # of BOTH: header, base, checksum
GOLDEN_BASE = "44664f0101deadbeef1ec8011a000102030405060708090a0b0c0d0e0f10111213141516171819" + "a43dbb7b"
SCALED = dataclasses.replace(BOTH, scale=10)
GOLDEN_BOTH = (
    "44664f0102deadbeef1ec80104" + "62617365" + "5d6af9d8" + "c80309" + "010203" + "000102030405060708" + "0e29b3fe"
)

GOLDEN_SCALED = (
    "44664f010adeadbeef1ec8010a04" + "62617365" + "6921dac9" + "c80309" + "010203" + "000102030405060708" + "1e2e90f7"
)

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)
sections = st.binary(min_size=1, max_size=200)
residuals = st.builds(CodedResidual, code=st.integers(1, 255), hyper=sections, symbols=sections)
sides = st.integers(16, 2**20)
ways = st.sampled_from([{"fixed_length": True}, {"fixed_length": False}, {"fixed_length": False, "in_passes": True}])
pictures = st.builds(
    lambda way, **rest: CodedPicture(**rest, **way),
    way=ways,
    height=sides,
    width=sides,
    fingerprint=st.binary(min_size=4, max_size=4),
    base=sections,
    residual=st.none() | residuals,
    scale=st.integers(LEAST_SCALE, WHOLE),
)
either = pytest.mark.parametrize("picture", [BASE, BOTH, SCALED], ids=["base", "both", "scaled"])


def resealed(content: bytes) -> bytes:
    """`content` with a CRC that matches it: what a foreign or newer program may have written."""
    return content + zlib.crc32(content).to_bytes(4, "big")


def edited(picture: CodedPicture, position: int, replacement: bytes, length: int = 1) -> bytes:
    """The picture's file with other bytes in its last layer, and a checksum that matches."""
    content = pack(picture)[:-4]
    return resealed(content[:position] + replacement + content[position + length :])


def altered(picture: CodedPicture, position: int, byte: bytes) -> bytes:
    data = pack(picture)
    return data[:position] + byte + data[position + 1 :]


def alone(picture: CodedPicture) -> CodedPicture:
    return dataclasses.replace(picture, residual=None)


def refused(data: bytes, message: str | None = None, preview: bool = False) -> None:
    with pytest.raises(BitstreamError, match=message) as error:
        unpack(data, preview)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("picture", "golden"),
    [(BASE, GOLDEN_BASE), (BOTH, GOLDEN_BOTH), (SCALED, GOLDEN_SCALED)],
    ids=["base", "both", "scaled"],
)
def test_golden_files_pin_the_format(picture, golden):
    assert pack(picture).hex() == golden
    assert unpack(bytes.fromhex(golden)) == picture
    assert unpack(bytes.fromhex(golden), preview=True) == alone(picture)


@quick
@given(picture=pictures)
def test_any_picture_round_trips_and_every_byte_is_accounted_for(picture):
    data, sizes = pack(picture), picture.section_bytes
    assert unpack(data) == picture and unpack(data, preview=True) == alone(picture)
    assert list(sizes) == (["base", "hyper", "residual"] if picture.residual else ["base"])
    assert len(data) == picture.header_bytes + sum(sizes.values()) + picture.check_bytes
    assert picture.check_bytes == (8 if picture.residual else 4)
    h, w = picture.latent_size
    assert picture.section_bpp == 8 * sum(sizes.values()) / (256 * h * w)


@quick
@given(picture=pictures, residual=residuals)
def test_the_base_layer_is_the_base_file_but_for_a_flag(picture, residual):
    whole, base = pack(dataclasses.replace(picture, residual=residual)), pack(alone(picture))
    size = len(base) - 4
    assert [i for i in range(size) if whole[i] != base[i]] == [4] and whole[4] == base[4] | 2
    for end in (size, len(whole) - 4):
        assert whole[end : end + 4] == zlib.crc32(whole[:end]).to_bytes(4, "big")


@quick
@given(tail=st.binary(max_size=60), flags=st.integers(0, 255), version=st.integers(0, 255))
def test_garbage_is_refused_or_is_what_pack_writes(tail, flags, version):
    """With the beginning of a file, and with checksums that match."""
    for garbage in (tail, b"DfO" + tail, b"DfO\x01" + tail, b"DfO\x01\x00" + tail):
        refused(garbage)
    for data in (resealed(b"DfO" + bytes([version, flags]) + tail), resealed(pack(BOTH)[:BASE_END] + tail)):
        try:
            picture = unpack(data)
        except BitstreamError as error:
            assert "\n" not in str(error)
        else:
            assert pack(picture) == data


@either
def test_every_mutation_of_one_byte_is_refused(picture):
    """A damaged base is never previewed; damage behind it does not matter there."""
    base_end = len(pack(alone(picture)))
    for position in range(len(pack(picture))):
        for value in set(range(256)) - {pack(picture)[position]}:
            data = altered(picture, position, bytes([value]))
            refused(data)
            if position < base_end:
                refused(data, preview=True)
            else:
                assert unpack(data, preview=True) == alone(picture)


@quick
@given(picture=pictures)
def test_cut_files_are_refused_but_previewed_from_the_end_of_the_base_on(picture):
    data, base_end = pack(picture), len(pack(alone(picture)))
    for size in range(len(data)):
        way_out = "bytes, within its residual; its base is whole" if size >= base_end else ""
        refused(data[:size], f"cut .*after {size} {way_out}" if size else "the file is empty")
        if size < base_end:
            refused(data[:size], preview=True)
        else:
            assert unpack(data[:size], preview=True) == alone(picture)


@either
def test_every_extension_is_refused(picture):
    data, base = pack(picture), pack(alone(picture))
    for extra in [bytes([value]) for value in range(256)] + [b"\0" * 7, data]:
        refused(data + extra, f"^{len(extra)} bytes follow the end of the file's {len(data)}")
        refused(base + extra, "follow", preview=True)  # a base-only file has an end in a preview, too


def test_residuals_do_not_go_with_another_base():
    """The second checksum begins at the first byte: a whole residual behind another whole base is refused."""
    other = pack(dataclasses.replace(BOTH, base=b"BASE"))
    refused(other[:BASE_END] + pack(BOTH)[BASE_END:], "checksum does not match")


@pytest.mark.parametrize(
    ("height", "width", "lengths", "expected"),
    [
        (16, 16, [1], 16),
        (127, 127, [64], 16),
        (512, 768, [1536], 19),
        (1400, 2048, [11264], 19),
        (2**20, 2**20, [5], 20),
        (512, 768, [1536, 40, 3000], 27),
        (512, 768, [1, 1, 1], 25),
        (512, 768, [1728, 2000, 16_383], 28),
    ],
)
def test_bytes_beside_the_sections(height, width, lengths, expected):
    base, *above = map(bytes, lengths)
    picture = CodedPicture(height, width, b"abcd", base, False, CodedResidual(9, *above) if above else None)
    assert picture.header_bytes + picture.check_bytes == expected == len(pack(picture)) - sum(lengths)


@pytest.mark.parametrize(
    ("height", "width", "latent"), [(16, 16, (1, 1)), (17, 32, (2, 2)), (512, 768, (32, 48)), (33, 31, (3, 2))]
)
def test_latent_size(height, width, latent):
    assert CodedPicture(height, width, b"abcd", b"x", False).latent_size == latent


@pytest.mark.parametrize(
    ("height", "width", "scale", "coded", "latent"),
    [
        (512, 768, 16, (512, 768), (32, 48)),
        (512, 768, 10, (320, 480), (20, 30)),
        (333, 517, 12, (250, 388), (16, 25)),  # 249.75 and 387.75
        (20, 200, 10, (16, 125), (1, 8)),  # 12.5, which is too small, and 125
        (36, 2**20, 10, (23, 655_360), (2, 40_960)),  # 22.5
    ],
)
def test_a_picture_that_is_coded_smaller(height, width, scale, coded, latent):
    picture = CodedPicture(height, width, b"abcd", b"x", False, scale=scale)
    assert picture.coded_size == coded and picture.latent_size == latent


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not a .dfo file"),
        (b"Df0" + pack(BASE)[3:], "not a .dfo file"),
        (b"X", "not a .dfo file"),
        (edited(BASE, 3, b"\x02"), "version 2; this program reads 1: update"),
        (edited(BASE, 3, b"\x00"), "version 0; this program reads 1: update"),
        (altered(BASE, 3, b"\x02"), "damaged"),
        (edited(BASE, 4, b"\x02"), "cut after 43 bytes, within its residual"),
        (edited(BASE, 4, b"\x10"), "features .flags 0x10. of a newer program: update"),
        (edited(BASE, 4, b"\x83"), "newer program: update"),
        (edited(BASE, 4, b"\x05"), "at fixed length and as coded in passes: the file is damaged"),
        (altered(BASE, 4, b"\x03"), "damaged"),
        (edited(BASE, 9, b"\x0f"), "200×15 pixels cannot be stored: each side must be 16 to 1048576"),
        (edited(BASE, 9, b"\x81\x80\x40"), "200×1048577 pixels"),
        (edited(BASE, 9, b"\x9e\x00"), "shortest form"),
        (edited(BASE, 12, b"\x9a\x80\x00"), "shortest form"),
        (edited(BASE, 9, b"\x80\x80\x80\x80\x80\x01"), "too large"),
        (edited(BASE, 12, b"\x1b"), "cut after 43 bytes of 44, or its header is damaged"),
        (edited(BASE, 12, b"\x00", 27), "base section is empty"),
        (altered(BASE, 20, b"\xff"), "checksum does not match: the file is damaged"),
        (edited(BOTH, 21, b"\x00"), "the code of the level is 0, not 1 to 255"),
        (edited(BOTH, 22, b"\x00\x0c", 2), "section of the residual is empty"),
        (edited(BOTH, 22, b"\x0c\x00", 2), "section of the residual is empty"),
        (edited(BOTH, 22, b"\x83\x00"), "shortest form"),
        (edited(BOTH, 22, b"\xff\xff\xff\xff\xff\x01"), "too large"),
        (edited(BOTH, 23, b"\xff\xff\xff\xff\x7f"), "cut after .* within its residual"),
        (edited(BOTH, 23, b"\x08"), "checksum does not match|follow"),
        (pack(BOTH)[:-4] + bytes(4), "checksum does not match"),
        *((edited(alone(SCALED), 12, bytes([n])), f"the scale is {n} sixteenths, not 4") for n in (0, 3, 17, 255)),
        (edited(alone(SCALED), 12, b"\x10"), "coded at a smaller size, and its scale is the whole"),
        (pack(SCALED)[:12], "cut within its header, after 12 bytes"),
        (resealed(resealed(b"DfO\x01\x12" + pack(BOTH)[5 : BASE_END - 4]) + pack(BOTH)[21:-4]), "newer program"),
    ],
)
def test_refusals_say_what_is_wrong(data, message):
    refused(data, message)


@pytest.mark.parametrize(
    "change", [{"height": 15}, {"width": 2**20 + 1}, {"base": b""}, {"scale": 3}, {"scale": 17}], ids=str
)
def test_what_cannot_be_stored_is_refused(change):
    with pytest.raises(BitstreamError):
        dataclasses.replace(BASE, **change)


def test_noise_seed_is_the_crc_of_the_base():
    assert noise_seed(b"123456789") == 0xCBF43926
