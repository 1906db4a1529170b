"""Picture files that are written here by hand, byte by byte: depth, sign, polarity, planes, keys, metadata."""

import io
import os
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from utils import picture_files
from utils.errors import PictureError
from utils.images import decode_image

HEIGHT, WIDTH = 20, 24


def noise(*shape: int, high: int = 256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, high, shape).astype(dtype)


def read(data: bytes) -> np.ndarray:
    """The picture as read, (H, W, 3)."""
    return decode_image(data, "a file").permute(1, 2, 0).numpy()


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def packed(values: np.ndarray, bits: int, order: str = ">") -> bytes:
    """Rows of unsigned samples of some bits, each row from a new byte."""
    if bits in (8, 16, 32):
        return values.astype(f"{order}u{bits // 8}").tobytes()
    rows = values.reshape(len(values), -1, 1) >> np.arange(bits)[::-1] & 1
    return np.packbits(rows.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


# PNG ------------------------------------------------------------------------------------------------------------------


def chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png(values: np.ndarray, bits: int, colour_type: int, *before: bytes, after: bytes = b"") -> bytes:
    rows = packed(values, bits)
    stride = len(rows) // HEIGHT
    scanlines = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(HEIGHT))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour_type, 0, 0, 0)
    body = [chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(scanlines)), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("key", [0, 1, 2])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_colour_key_of_grey_is_a_sample_of_the_files_depth(bits, key):
    key = min(key, 2**bits - 1)
    values = noise(HEIGHT, WIDTH, high=min(4, 2**bits), dtype=np.int64)
    expected = np.where(values == key, 255, np.round(values / (2**bits - 1) * 255))
    assert np.array_equal(read(png(values, bits, 0, chunk(b"tRNS", struct.pack(">H", key)))), grey_to_rgb(expected))


def test_a_colour_key_of_16_bits_is_compared_with_all_of_them():
    """Neither colours of the same first bytes are taken for it, nor is it missed where the bytes differ."""
    key = np.array([0x8012, 0x2034, 0x4056])
    values = np.broadcast_to(key, (HEIGHT, WIDTH, 3)).copy()
    values[5, 5] += (0, 0, 1)
    values[6, 6] -= (256, 0, 0)
    expected = np.full((HEIGHT, WIDTH, 3), 255)
    expected[5, 5], expected[6, 6] = (0x80, 0x20, 0x40), (0x7F, 0x20, 0x40)
    data = png(values, 16, 2, chunk(b"tRNS", struct.pack(">3H", *key)))
    assert np.array_equal(read(data), expected)
    with Image.open(io.BytesIO(data)) as image:  # its neighbour without a key, and what is turned
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = png(values, 16, 2, chunk(b"tRNS", struct.pack(">3H", *key)), chunk(b"eXIf", exif.tobytes()[6:]))
        assert np.array_equal(read(png(values, 16, 2)), np.asarray(image.convert("RGB")))
    assert np.array_equal(read(turned), np.rot90(expected, -1))


COLOURS = noise(HEIGHT, WIDTH, 3)
LONG = zlib.compress(b"prompt " * 2**18)
FAR_TOO_LONG = zlib.compress(bytes(2**25))
METADATA = {
    "a wrong checksum": chunk(b"tEXt", b"Title\0a", checksum=1),
    "a wrong checksum of an unknown chunk": chunk(b"abCd", b"what", checksum=1),
    "a wrong checksum of a key": chunk(b"tRNS", struct.pack(">3H", *COLOURS[0, 0]), checksum=1),
    "a key cut short": chunk(b"tRNS", b"\0"),
    "a gamma cut short": chunk(b"gAMA", b"\0"),
    "a size cut short": chunk(b"pHYs", b"\0\0"),
    "a text of a key's name": chunk(b"tEXt", b"transparency\0none"),
    "a text of a profile's name": chunk(b"tEXt", b"icc_profile\0none"),
    "a text of 1.8 MB": chunk(b"zTXt", b"prompt\0\0" + LONG),
    "an international text of 1.8 MB": chunk(b"iTXt", b"prompt\0\1\0\0\0" + LONG),
    "a profile of 1.8 MB": chunk(b"iCCP", b"ICC\0\0" + LONG),
    "a text that swells": chunk(b"zTXt", b"prompt\0\0" + FAR_TOO_LONG),
    "a profile that swells": chunk(b"iCCP", b"ICC\0\0" + FAR_TOO_LONG),
    "a text of an unknown packing": chunk(b"zTXt", b"prompt\0\7" + LONG),
    "frames out of order": chunk(b"fcTL", struct.pack(">5I2H2B", 7, WIDTH, HEIGHT, 0, 0, 1, 1, 0, 0)),
}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_a_png_is_read_beside_damaged_and_large_metadata(metadata, where):
    data = png(COLOURS, 8, 2, metadata) if where == "before" else png(COLOURS, 8, 2, after=metadata)
    assert np.array_equal(read(data), COLOURS)


def test_what_is_whole_beside_damaged_metadata_still_counts():
    key = chunk(b"tRNS", struct.pack(">3H", *COLOURS[3, 4]))
    expected = np.where((COLOURS == COLOURS[3, 4]).all(axis=2, keepdims=True), 255, COLOURS)
    assert (expected[3, 4] == 255).all()
    assert np.array_equal(read(png(COLOURS, 8, 2, key, METADATA["a wrong checksum"])), expected)


def test_damaged_pixels_are_refused_whatever_stands_beside_them():
    for metadata in (b"", METADATA["a wrong checksum"]):
        data = png(COLOURS, 8, 2, metadata)
        for cut in (data[:-600], data.replace(chunk(b"IEND", b"")[:8], b"")[:-700]):
            with pytest.raises(PictureError, match="cut short"):
                read(cut)
    with pytest.raises(PictureError, match="24x20 is more than the 99 pixels"):
        picture_files.read_rgb(io.BytesIO(png(COLOURS, 8, 2, METADATA["a wrong checksum"])), 99)


# TIFF -----------------------------------------------------------------------------------------------------------------

BITS, PHOTOMETRIC, SAMPLE_FORMAT, PLANAR, COLORMAP, EXTRA, SUBFILE = 258, 262, 339, 284, 320, 338, 254


def tiff(planes: list[bytes], order: str = "<", **tags: tuple[int, ...]) -> bytes:
    """An uncompressed TIFF of one strip for each plane; `tags` by the names above, the values short integers."""
    given = {globals()[name]: values for name, values in tags.items()}
    entries = {256: (WIDTH,), 257: (HEIGHT,), 259: (1,), 277: (len(given[BITS]),), 278: (HEIGHT,)} | given
    start = 8 + 2 + 12 * (len(entries) + 2) + 4
    extra = b""

    def placed(values: bytes) -> bytes:
        nonlocal extra
        if len(values) <= 4:
            return values.ljust(4, b"\0")
        extra += values
        return struct.pack(f"{order}I", start + len(extra) - len(values))

    fields = {tag: (3, len(v), placed(struct.pack(f"{order}{len(v)}H", *v))) for tag, v in entries.items()}
    counts = list(map(len, planes))
    first = start + len(extra) + (8 * len(planes) if len(planes) > 1 else 0)
    offsets = [first + sum(counts[:i]) for i in range(len(planes))]
    for tag, values in ((273, offsets), (279, counts)):
        fields[tag] = (4, len(values), placed(struct.pack(f"{order}{len(values)}I", *values)))
    table = b"".join(struct.pack(f"{order}HHI", tag, *fields[tag][:2]) + fields[tag][2] for tag in sorted(fields))
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(fields))
    return head + table + bytes(4) + extra + b"".join(planes)


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("order", "<>")
def test_grey_is_scaled_by_its_bits_and_inverted_by_its_polarity(bits, white_is_zero, order):
    values = noise(HEIGHT, WIDTH, high=2**bits, dtype=np.int64)
    data = tiff([packed(values, bits, order)], order, BITS=(bits,), PHOTOMETRIC=(int(not white_is_zero),))
    if (bits == 12 and (white_is_zero or order == ">")) or (bits == 16 and white_is_zero and order == ">"):
        with pytest.raises(PictureError, match="a TIFF .* of a kind that is not read"):  # not by Pillow
            read(data)
        return
    expected = np.round(values / (2**bits - 1) * 255)
    assert np.array_equal(read(data), grey_to_rgb(255 - expected if white_is_zero else expected))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("channels", [3, 4])
def test_colours_together_and_in_planes(bits, together, order, channels):
    values = noise(HEIGHT, WIDTH, channels, high=2**bits, dtype=np.int64)
    parts = [values] if together else np.moveaxis(values, 2, 0)
    tags = {"BITS": (bits,) * channels, "PHOTOMETRIC": (2,), "PLANAR": (1 if together else 2,)}
    data = tiff([packed(p, bits, order) for p in parts], order, **tags, **({"EXTRA": (2,)} if channels == 4 else {}))
    shares = values / (2**bits - 1)
    on_white = 1 - (1 - shares[..., :3]) * (shares[..., 3:] if channels == 4 else 1)
    # Pillow keeps the first 8 of 16 bits, of colour and alpha alike.
    assert np.abs(read(data) - 255 * on_white).max() <= (0.51 if bits == 8 else 2.6)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("kind, told", [(2, "signed samples"), (3, "floating-point samples"), (1, "32-bit samples")])
@pytest.mark.parametrize("value", [0, 100])
def test_samples_without_a_range_are_refused_whatever_they_are(bits, kind, told, value):
    if (kind, bits) in {(1, 8), (1, 16)}:
        return
    data = tiff([packed(np.full((HEIGHT, WIDTH), value), bits)], BITS=(bits,), PHOTOMETRIC=(1,), SAMPLE_FORMAT=(kind,))
    told = told if (kind, bits) not in {(2, 8), (3, 8), (3, 16)} else "samples|kind that is not read"
    with pytest.raises(PictureError, match=told) as caught:
        read(data)
    assert "convert it to" in str(caught.value) and "\n" not in str(caught.value)


def test_grey_with_premultiplied_alpha_and_its_planes():
    """Premultiplied, the light is the value itself, and white shows through what is missing of alpha."""
    alpha = noise(HEIGHT, WIDTH).astype(int)
    grey = noise(HEIGHT, WIDTH, 1)[..., 0] * alpha // 255
    tags = {"BITS": (8, 8), "PHOTOMETRIC": (1,)}
    together = packed(np.stack([grey, alpha], axis=2), 8)
    assert np.abs(read(tiff([together], **tags, EXTRA=(1,))) - grey_to_rgb(grey + 255 - alpha).astype(int)).max() <= 1
    straight = np.round(255 - (255 - grey) * alpha / 255)
    assert np.array_equal(read(tiff([together], **tags, EXTRA=(2,))), grey_to_rgb(straight))
    planes = [packed(grey, 8), packed(alpha, 8)]
    for extra in (1, 2):
        with pytest.raises(PictureError, match="alpha in separate planes"):
            read(tiff(planes, **tags, EXTRA=(extra,), PLANAR=(2,)))


def test_a_cut_tiff_is_one_line_and_the_library_says_nothing_itself(capfd):
    data = tiff([packed(COLOURS, 8)], BITS=(8, 8, 8), PHOTOMETRIC=(2,))
    assert np.array_equal(read(data), COLOURS)
    with pytest.raises(PictureError, match="a file: damaged or cut short"):
        read(data[:-200])
    print("heard", file=sys.stderr)
    assert capfd.readouterr().err == "heard\n"


def test_messages_to_stderr_are_heard_while_a_tiff_is_read(monkeypatch):
    """Pictures are read in several threads, and the errors of others are told meanwhile."""
    load, seen = TiffImagePlugin.TiffImageFile.load, []
    monkeypatch.setattr(
        TiffImagePlugin.TiffImageFile, "load", lambda image: seen.append(os.fstat(2).st_ino) or load(image)
    )
    read(tiff([packed(COLOURS, 8)], BITS=(8, 8, 8), PHOTOMETRIC=(2,)))
    assert set(seen) == {os.fstat(2).st_ino}


def test_the_thumbnail_of_a_cameras_raw_file_is_not_taken_for_its_picture():
    data = tiff([packed(COLOURS, 8)], BITS=(8, 8, 8), PHOTOMETRIC=(2,), SUBFILE=(1,))
    with pytest.raises(PictureError, match="its first picture is a thumbnail, as in a camera's raw file"):
        read(data)
    assert np.array_equal(
        read(data.replace(struct.pack("<HHIH", 254, 3, 1, 1), struct.pack("<HHIH", 254, 3, 1, 0))), COLOURS
    )


@pytest.mark.parametrize("scale", [1, 256, 257])
def test_palettes_of_16_bits_and_those_that_hold_8(scale):
    index, palette = noise(HEIGHT, WIDTH), noise(256, 3)
    colours = tuple(int(v) * scale for v in palette.T.ravel())
    data = tiff([packed(index, 8)], BITS=(8,), PHOTOMETRIC=(3,), COLORMAP=colours)
    assert np.array_equal(read(data), palette[index])


# JPEG 2000 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codestream", [False, True])
def test_jpeg_2000_of_other_depths_is_refused_where_pillow_mistakes_it(codestream):
    """Of 16-bit colours, it makes white black."""

    def coded(image: Image.Image, bits: int = 8) -> bytes:
        """`bits` as the file states them, in SIZ, of every component."""
        data = io.BytesIO()
        image.save(data, "jpeg2000", no_jp2=codestream)
        start, siz, rest = data.getvalue().partition(b"\xff\x4f\xff\x51")
        count = 3 * rest[37]
        return start + siz + rest[:38] + bytes([bits - 1, 1, 1]) * (count // 3) + rest[38 + count :]

    assert np.array_equal(read(coded(Image.fromarray(COLOURS))), COLOURS)
    grey = noise(HEIGHT, WIDTH, high=65536, dtype=np.uint16)
    assert np.array_equal(read(coded(Image.fromarray(grey), 16)), grey_to_rgb(np.round(grey / 257)))
    for mode, bits in (("RGB", 16), ("RGB", 12), ("RGBA", 10), ("LA", 16), ("L", 4)):
        with pytest.raises(PictureError, match=f"a file: JPEG 2000 with samples of {bits} bits is not read"):
            read(coded(Image.fromarray(COLOURS).convert(mode), bits))
