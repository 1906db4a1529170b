"""ICC profiles: pictures with profiles made here, against colours computed by hand."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from utils import colour
from utils.images import read_image

SIDE = 16
# The colours of sRGB's primaries as ICC profiles state them, adapted to D50: X, Y, Z.
RED, GREEN, BLUE = (0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)
LINEAR = b"curv" + bytes(8)
SIGNAL = np.linspace(0, 1, 1024)
LIGHT = np.where(SIGNAL <= 0.04045, SIGNAL / 12.92, ((SIGNAL + 0.055) / 1.055) ** 2.4)  # IEC 61966-2-1
CURVE = b"curv" + struct.pack(">II", 0, 1024) + np.round(LIGHT * 65535).astype(">u2").tobytes()


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


def profile(space: bytes, connection: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile (version 2)."""
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249)} | tags
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">I4xI", start + len(data), 0x02100000) + kind + space + connection + bytes(12) + b"acsp"
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + data


def rgb(red, green, blue, curve: bytes) -> bytes:
    tags = {b"rXYZ": xyz(*red), b"gXYZ": xyz(*green), b"bXYZ": xyz(*blue)}
    return profile(b"RGB ", b"XYZ ", b"mntr", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def cmyk() -> bytes:
    """Inks of which black alone shows: L* is 100 without it and 0 with all of it."""
    corners = b"".join(bytes([255 * (1 - black), 128, 128]) for _ in range(8) for black in (0, 1))
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    return profile(b"CMYK", b"Lab ", b"prtr", {b"A2B0": table + ramp * 4 + corners + ramp * 3})


def read(tmp_path, image: Image.Image, name: str, icc: bytes) -> list[int]:
    """The colour of a picture of one colour."""
    options = {"lossless": True, "quality": 100, "subsampling": 0}
    image.save(tmp_path / name, icc_profile=icc, **(options if name.endswith(("jpg", "webp")) else {}))
    picture = read_image(tmp_path / name)
    assert (picture == picture[:, :1, :1]).all()
    return picture[:, 0, 0].tolist()


def plain(mode: str, value) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), value)


EXCHANGED = rgb(GREEN, RED, BLUE, CURVE)
COLOUR = (200, 60, 120)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_exchanged_primaries_come_back(tmp_path, name):
    assert read(tmp_path, plain("RGB", COLOUR), name, EXCHANGED) == pytest.approx((60, 200, 120), abs=2)


def test_linear_samples_become_those_of_the_curve(tmp_path):
    """Half the light is 188: 255 (1.055 x 0.502^(1 / 2.4) - 0.055) = 187.8. So for grey, in 8 bits and in 16."""
    grey = profile(b"GRAY", b"XYZ ", b"mntr", {b"kTRC": LINEAR})
    assert read(tmp_path, plain("RGB", (128, 128, 128)), "a.png", rgb(RED, GREEN, BLUE, LINEAR)) == [188] * 3
    assert read(tmp_path, plain("L", 128), "a.png", grey) == pytest.approx([188] * 3, abs=1)
    assert read(tmp_path, plain("L", 128), "a.jpg", grey) == pytest.approx([188] * 3, abs=1)
    assert read(tmp_path, plain("I;16", 128 * 257), "a.png", grey) == pytest.approx([188] * 3, abs=1)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_inks_become_colours(tmp_path, name):
    """Half of black is L* 49.8, Y 0.1825, and that 118; without a profile it would be 127."""
    assert read(tmp_path, plain("CMYK", (0, 0, 0, 128)), name, cmyk()) == pytest.approx([118] * 3, abs=2)
    assert read(tmp_path, plain("CMYK", (0, 0, 0, 128)), name, b"") == [127] * 3


def test_what_is_transparent_is_white_after_the_conversion(tmp_path):
    """Half of the exchanged colour on white: 255 - (255 - v) / 2."""
    assert read(tmp_path, plain("RGBA", (*COLOUR, 128)), "a.png", EXCHANGED) == pytest.approx((157, 227, 187), abs=2)
    palette = plain("P", 0)
    palette.putpalette(COLOUR)
    assert read(tmp_path, palette, "a.png", EXCHANGED) == pytest.approx((60, 200, 120), abs=2)
    grey = profile(b"GRAY", b"XYZ ", b"mntr", {b"kTRC": LINEAR})
    assert read(tmp_path, plain("LA", (128, 0)), "a.png", grey) == [255] * 3


@pytest.mark.parametrize(
    "mode, icc",
    [
        ("RGB", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        ("RGB", rgb(RED, GREEN, BLUE, CURVE)),
        ("RGB", b"no profile"),
        ("RGB", EXCHANGED[:200]),
        ("RGB", cmyk()),
        ("L", EXCHANGED),
    ],
    ids=["sRGB", "another sRGB", "none", "cut", "of inks", "of colours, for grey"],
)
def test_srgb_and_what_cannot_be_used_change_nothing_and_cost_nothing(tmp_path, mode, icc):
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).convert(mode)
    colours.save(tmp_path / "a.png", icc_profile=icc)
    expected = np.asarray(colours.convert("RGB"))
    assert np.array_equal(read_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), expected)
    assert colour._conversion(icc, mode) is None
    before = colour._conversion.cache_info().misses
    read_image(tmp_path / "a.png")
    assert colour._conversion.cache_info().misses == before


def test_the_profile_in_the_header_of_jpeg_2000_counts(tmp_path):
    """Pillow leaves it there: the `colr` box has 3 bytes before it, the first one 2 for a profile."""
    plain("RGB", COLOUR).save(tmp_path / "a.jp2")
    head, named, rest = (tmp_path / "a.jp2").read_bytes().partition(struct.pack(">I", 15) + b"colr")
    assert rest[:3] == b"\1\0\0"  # of 15 bytes, 8 are left for sRGB's number
    box = struct.pack(">I4s3B", 11 + len(EXCHANGED), b"colr", 2, 0, 0) + EXCHANGED
    outer = struct.pack(">I", 30 + len(box)) + b"jp2h"
    (tmp_path / "a.jp2").write_bytes(head.replace(struct.pack(">I", 45) + b"jp2h", outer) + box + rest[7:])
    picture = read_image(tmp_path / "a.jp2")
    assert picture[:, 0, 0].tolist() == pytest.approx((60, 200, 120), abs=2)


def test_lab_is_read(tmp_path):
    lab = ImageCms.profileToProfile(
        plain("RGB", COLOUR), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert read(tmp_path, lab, "a.tif", b"") == pytest.approx(COLOUR, abs=3)
