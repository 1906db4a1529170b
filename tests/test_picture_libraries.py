"""Pictures through libraries: images that Pillow has opened, and whatever a library raises, lacks or would start."""

import io
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps

from tests.test_picture_files import COLOURS, HEIGHT, WIDTH, chunk, noise, packed, png, read, tiff
from utils import picture_files
from utils.errors import PictureError
from utils.images import decode_image, from_pillow
from utils.picture_files import strict_pillow

# Images of Pillow -----------------------------------------------------------------------------------------------------


def test_an_image_that_is_opened_is_read_as_its_file():
    """Where it is not loaded: what Pillow loads has lost the file's depth. It can be loaded afterwards."""
    key = np.array([0x8012, 0x2034, 0x4056])
    grey = noise(HEIGHT, WIDTH, high=4096, dtype=np.int64)
    planes = [packed(plane, 16, "<") for plane in np.moveaxis(COLOURS * 257, 2, 0)]
    files = [
        png(np.broadcast_to(key, (HEIGHT, WIDTH, 3)), 16, 2, chunk(b"tRNS", struct.pack(">3H", *key))),
        png(noise(HEIGHT, WIDTH, high=4), 2, 0, chunk(b"tRNS", struct.pack(">H", 1))),
        tiff([packed(grey, 12)], BITS=(12,), PHOTOMETRIC=(1,)),
        tiff(planes, BITS=(16,) * 3, PHOTOMETRIC=(2,), PLANAR=(2,)),
    ]
    for data in files:
        with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(data)) as other:
            assert np.array_equal(from_pillow(image, "it").permute(1, 2, 0), read(data))
            assert image.tile and np.array_equal(np.asarray(image), np.asarray(other))
    signed = Image.open(io.BytesIO(tiff([packed(grey, 16)], BITS=(16,), PHOTOMETRIC=(1,), SAMPLE_FORMAT=(2,))))
    with pytest.raises(PictureError, match="it: signed samples"):
        from_pillow(signed, "it")


def test_a_later_frame_and_a_changed_image_are_taken_as_they_are():
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = io.BytesIO()
    frames[0].save(data, "gif", save_all=True, append_images=frames[1:])
    with Image.open(data) as image:
        image.seek(1)
        assert from_pillow(image, "it")[:, 0, 0].tolist() == [0, 0, 255]
    image = Image.open(io.BytesIO(png(COLOURS, 8, 2)))
    image.paste((1, 2, 3), (0, 0, WIDTH, HEIGHT))
    assert (from_pillow(image, "it") == torch.tensor([1, 2, 3])[:, None, None]).all()
    image.close()
    with pytest.raises(PictureError, match="it: damaged or cut short .*closed"):
        from_pillow(image, "it")


def test_pillows_own_state_comes_back_when_the_last_thread_leaves(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    first, second = strict_pillow(), strict_pillow()
    first.__enter__(), second.__enter__(), first.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS is None
    second.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 7


# What a library raises ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ValueError("two\nlines"), RuntimeError(), KeyError(3), RecursionError(), OSError(5, "no")]
)
@pytest.mark.parametrize("where", [(Image.Image, "convert"), (picture_files, "to_srgb"), (ImageOps, "exif_transpose")])
def test_whatever_a_library_raises_is_one_line_for_that_picture(monkeypatch, where, error):
    def fail(*_, **__):
        raise error

    data = io.BytesIO()
    Image.fromarray(noise(HEIGHT, WIDTH, 4)).save(data, "png")
    monkeypatch.setattr(*where, fail)
    if where[1] == "exif_transpose":
        assert read(data.getvalue()).shape == (HEIGHT, WIDTH, 3)
        return
    with pytest.raises(PictureError, match="a file: damaged or cut short") as caught:
        read(data.getvalue())
    assert "\n" not in str(caught.value)


def test_a_drawing_starts_no_other_program(monkeypatch):
    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", fail)
    with pytest.raises(PictureError, match="a file: an EPS drawing is not read; convert it to PNG"):
        read(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n")


def test_want_of_memory_is_not_called_damage(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(picture_files, "to_srgb", fail)
    with pytest.raises(PictureError, match="not enough memory"):
        read(png(COLOURS, 8, 2))


def test_heic_is_read_or_its_reader_named(monkeypatch):
    header = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(99)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(PictureError, match=r"a HEIC picture: no reader \(pip install pillow-heif\)"):
        read(header)
    monkeypatch.undo()
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    with pytest.raises(PictureError, match="not a picture"):
        read(header)
    data = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 60, 120))).save(data, quality=95)
    picture = decode_image(data.getvalue(), "a file")
    assert picture.shape == (3, 48, 64)
    assert (picture.float().mean((1, 2)) - torch.tensor([200.0, 60, 120])).abs().max() < 4
