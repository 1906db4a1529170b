"""Files with residual sections: the base comes first and stands alone, a second checksum covers the whole."""

import dataclasses
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.bitstream import CodedPicture, CodedResidual, noise_seed, pack, unpack
from utils.errors import BitstreamError

RESIDUAL = CodedResidual(level=200, hyper=b"\x01\x02\x03", symbols=bytes(range(9)))
SMALL = CodedPicture(30, 200, b"\xde\xad\xbe\xef", b"base", False, RESIDUAL)
BASE_END = 13 + 4 + 4  # header, base, checksum
GOLDEN_FILE = (
    "44664f0102deadbeef1ec80104" + "62617365" + "5d6af9d8" + "c80309" + "010203" + "000102030405060708" + "0e29b3fe"
)

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)
residuals = st.builds(
    CodedResidual,
    level=st.integers(1, 255),
    hyper=st.binary(min_size=1, max_size=200),
    symbols=st.binary(min_size=1, max_size=200),
)
pictures = st.builds(
    CodedPicture,
    height=st.integers(16, 2**20),
    width=st.integers(16, 2**20),
    fingerprint=st.binary(min_size=4, max_size=4),
    base=st.binary(min_size=1, max_size=200),
    fixed_length=st.booleans(),
    residual=residuals,
)


def resealed(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(4, "big")


def edited(position: int, replacement: bytes, length: int = 1) -> bytes:
    """The small file with another beginning of its residual's layer, and checksums that match."""
    content = pack(SMALL)[:-4]
    return resealed(content[:position] + replacement + content[position + length :])


def base_alone(picture: CodedPicture) -> CodedPicture:
    return dataclasses.replace(picture, residual=None)


def test_golden_file_pins_the_format():
    assert pack(SMALL).hex() == GOLDEN_FILE
    assert unpack(bytes.fromhex(GOLDEN_FILE)) == SMALL
    assert unpack(bytes.fromhex(GOLDEN_FILE), preview=True) == base_alone(SMALL)


@quick
@given(picture=pictures)
def test_any_picture_round_trips_and_every_byte_is_accounted_for(picture):
    data = pack(picture)
    assert unpack(data) == picture
    assert unpack(data, preview=True) == base_alone(picture)
    assert picture.section_bytes.keys() == {"base", "hyper", "residual"}
    parts = picture.header_bytes, *picture.section_bytes.values(), picture.check_bytes
    assert 8 * sum(parts) == 8 * len(data) and picture.check_bytes == 8
    h, w = picture.latent_size
    assert picture.section_bpp == 8 * sum(picture.section_bytes.values()) / (256 * h * w)
    assert noise_seed(picture.base) == noise_seed(unpack(data, preview=True).base)


@quick
@given(picture=pictures)
def test_the_base_layer_is_the_base_file_but_for_a_flag(picture):
    with_residual, alone = pack(picture), pack(base_alone(picture))
    size = len(alone) - 4
    differing = [i for i in range(size) if with_residual[i] != alone[i]]
    assert differing == [4] and with_residual[4] == alone[4] | 2
    assert with_residual[size : size + 4] == zlib.crc32(with_residual[:size]).to_bytes(4, "big")
    assert with_residual[-4:] == zlib.crc32(with_residual[:-4]).to_bytes(4, "big")


@pytest.mark.parametrize("sections", [(1536, 40, 3000), (1, 1, 1), (1728, 2000, 16_383)])
def test_at_most_28_bytes_stand_beside_the_sections_of_a_kodak_picture(sections):
    base, hyper, symbols = map(bytes, sections)
    picture = CodedPicture(512, 768, b"abcd", base, False, CodedResidual(9, hyper, symbols))
    assert len(pack(picture)) - sum(sections) <= 28


@quick
@given(picture=pictures)
def test_cut_files_are_refused_but_previewed_from_the_end_of_the_base_on(picture):
    data, base_end = pack(picture), len(pack(base_alone(picture)))
    for size in range(len(data)):
        with pytest.raises(BitstreamError, match="empty" if size == 0 else f"cut .*after {size} bytes"):
            unpack(data[:size])
        if size < base_end:
            with pytest.raises(BitstreamError):
                unpack(data[:size], preview=True)
        else:
            assert unpack(data[:size], preview=True) == base_alone(picture)


def test_a_cut_within_the_residual_is_told_of_with_the_way_out():
    data = pack(SMALL)
    for size in range(BASE_END, len(data)):
        with pytest.raises(BitstreamError, match="within its residual: --preview decodes the base, which is whole"):
            unpack(data[:size])


def test_every_mutation_of_one_byte_is_refused():
    data = pack(SMALL)
    for position in range(len(data)):
        for value in set(range(256)) - {data[position]}:
            mutated = data[:position] + bytes([value]) + data[position + 1 :]
            with pytest.raises(BitstreamError):
                unpack(mutated)
            if position < BASE_END:  # a damaged base is never previewed
                with pytest.raises(BitstreamError):
                    unpack(mutated, preview=True)
            else:
                assert unpack(mutated, preview=True) == base_alone(SMALL)


def test_residuals_do_not_go_with_another_base():
    """The second checksum begins at the first byte: a whole residual behind another whole base is refused."""
    other = dataclasses.replace(SMALL, base=b"BASE")
    with pytest.raises(BitstreamError, match="checksum does not match"):
        unpack(pack(other)[:BASE_END] + pack(SMALL)[BASE_END:])


def test_every_extension_is_refused():
    data = pack(SMALL)
    for extra in (b"\0", b"\xff", data, bytes(7)):
        with pytest.raises(BitstreamError, match=f"^{len(extra)} bytes follow the end of the file's {len(data)}"):
            unpack(data + extra)
        with pytest.raises(BitstreamError, match="follow"):
            unpack(pack(base_alone(SMALL)) + extra, preview=True)  # a base-only file has an end in a preview, too


@quick
@given(tail=st.binary(max_size=40))
def test_a_residual_of_garbage_with_valid_checksums_is_refused_or_is_what_pack_writes(tail):
    data = resealed(pack(SMALL)[:BASE_END] + tail)
    try:
        picture = unpack(data)
    except BitstreamError as error:
        assert "\n" not in str(error)
        return
    assert pack(picture) == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (edited(21, b"\x00"), "level of the residual is 0, not 1 to 255"),
        (edited(22, b"\x00\x0c", 2), "section of the residual is empty"),
        (edited(22, b"\x0c\x00", 2), "section of the residual is empty"),
        (edited(22, b"\x83\x00"), "shortest form"),
        (edited(22, b"\xff\xff\xff\xff\xff\x01"), "too large"),
        (edited(23, b"\xff\xff\xff\xff\x7f"), "cut after .* within its residual"),
        (edited(23, b"\x08"), "checksum does not match|follow"),
        (pack(SMALL)[:-4] + bytes(4), "checksum does not match"),
        (resealed(resealed(b"DfO\x01\x06" + pack(SMALL)[5 : BASE_END - 4]) + pack(SMALL)[21:-4]), "newer program"),
    ],
)
def test_refusals_say_what_is_wrong(data, message):
    with pytest.raises(BitstreamError, match=message) as error:
        unpack(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"level": 0}, {"level": 256}, {"hyper": b""}, {"symbols": b""}])
def test_what_cannot_be_stored_is_refused(change):
    with pytest.raises(BitstreamError):
        dataclasses.replace(RESIDUAL, **change)
