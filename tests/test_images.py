import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from utils.errors import DiffoError, PictureError
from utils.images import find_pictures, is_ours, read_image, to_signed, to_uint8, write_image

HEIGHT, WIDTH = 24, 40


def noise(*shape: int, high: int = 256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, high, shape).astype(dtype)


def read(path) -> np.ndarray:
    """The picture as read, (H, W, 3); its type and layout are the same whatever the file."""
    picture = read_image(path)
    assert picture.dtype == torch.uint8 and picture.is_contiguous() and picture.shape[0] == 3
    return picture.permute(1, 2, 0).numpy()


def saved(tmp_path, image: Image.Image, name: str = "a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def png(tmp_path, samples: np.ndarray, colour_type: int, *extra: bytes, side: int | None = None):
    """A PNG of big-endian samples (H, W, channels) written by hand, for what Pillow reads but cannot write."""
    rows = b"".join(b"\0" + row.tobytes() for row in samples.astype(samples.dtype.newbyteorder(">")))
    height, width = (side, side) if side else samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * samples.itemsize, colour_type, 0, 0, 0)
    chunks = [b"IHDR" + header, *extra, b"IDAT" + zlib.compress(rows), b"IEND"]
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    (tmp_path / "hand.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return tmp_path / "hand.png"


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.round(255 - (255.0 - colour) * alpha / 255).astype(np.uint8)


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.mark.parametrize("kind, mode", [(k, "RGB") for k in "png bmp tif ppm jpg webp".split()] + [("jpg", "CMYK")])
def test_formats(tmp_path, kind, mode):
    """Exact, or of one colour where coding is lossy."""
    lossy = kind in ("jpg", "webp")
    colour = np.full((HEIGHT, WIDTH, 3), (200, 60, 120), np.uint8) if lossy else noise(HEIGHT, WIDTH, 3)
    path = saved(tmp_path, Image.fromarray(colour).convert(mode), f"a.{kind}", quality=95)
    assert np.abs(read(path).astype(int) - colour).max() <= (4 if lossy else 0)


def test_grey_and_one_bit(tmp_path):
    grey = noise(HEIGHT, WIDTH)
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(grey))), grey_to_rgb(grey))
    bits = noise(HEIGHT, WIDTH, high=2) * np.uint8(255)
    image = Image.fromarray(bits).convert("1")
    assert np.array_equal(read(saved(tmp_path, image)), grey_to_rgb(bits))


def test_alpha_is_composited_on_white(tmp_path):
    colour, alpha = noise(HEIGHT, WIDTH, 3), noise(HEIGHT, WIDTH, 1)
    rgba = Image.fromarray(np.concatenate([colour, alpha], axis=2))
    assert np.array_equal(read(saved(tmp_path, rgba)), on_white(colour, alpha))
    grey_alpha = Image.merge("LA", [Image.fromarray(colour[..., 0]), Image.fromarray(alpha[..., 0])])
    expected = grey_to_rgb(on_white(colour[..., 0], alpha[..., 0]))
    assert np.array_equal(read(saved(tmp_path, grey_alpha)), expected)


def test_palette_and_its_transparency(tmp_path):
    index, palette, alpha = noise(HEIGHT, WIDTH, high=16), noise(16, 3), noise(16)
    image = Image.frombytes("P", (WIDTH, HEIGHT), index.tobytes())
    image.putpalette(palette.ravel().tolist())
    assert np.array_equal(read(saved(tmp_path, image)), palette[index])
    transparent = saved(tmp_path, image, transparency=alpha.tobytes())
    assert np.array_equal(read(transparent), on_white(palette[index], alpha[index][..., None]))


def test_one_transparent_colour(tmp_path):
    colour = noise(HEIGHT, WIDTH, 3, high=2) * np.uint8(90)
    path = saved(tmp_path, Image.fromarray(colour), transparency=(0, 90, 0))
    hit = (colour == (0, 90, 0)).all(axis=2)
    assert hit.any()
    assert np.array_equal(read(path), np.where(hit[..., None], 255, colour))


VALUES = np.arange(65536, dtype=np.uint16).reshape(256, 256)
SCALED = np.round(VALUES / 65535 * 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_is_scaled(tmp_path, name):
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(VALUES), name)), grey_to_rgb(SCALED))


def test_16_bit_grey_with_a_transparent_value(tmp_path):
    path = png(tmp_path, VALUES[..., None], 0, b"tRNS" + struct.pack(">H", 1000))
    assert np.array_equal(read(path), grey_to_rgb(np.where(VALUES == 1000, 255, SCALED)))


def test_16_bit_colour_is_scaled_within_one(tmp_path):
    values = noise(HEIGHT, WIDTH, 3, high=65536, dtype=np.uint16)
    got = read(png(tmp_path, values, 2))
    assert np.abs(got - values / 65535 * 255).max() < 1


@pytest.mark.parametrize("mode, value", [("F", 0.5), ("I", 255), ("I", -1)])
def test_kinds_without_a_range_are_refused(tmp_path, mode, value):
    path = saved(tmp_path, Image.new(mode, (WIDTH, HEIGHT), value), "a.tif")
    with pytest.raises(PictureError, match="no defined range"):
        read_image(path)


# The stored picture for each EXIF orientation, made from the upright one.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation, name", [*((n, "a.png") for n in STORED), (6, "a.webp"), (5, "a.tif")])
def test_exif_orientation_is_applied_once(tmp_path, orientation, name):
    upright = noise(HEIGHT, WIDTH, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    assert np.array_equal(read(saved(tmp_path, image, name, exif=exif, lossless=True)), upright)


def test_damaged_exif_does_not_lose_the_picture(tmp_path):
    colour = noise(HEIGHT, WIDTH, 3)
    path = saved(tmp_path, Image.fromarray(colour), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f garbage")
    assert np.array_equal(read(path), colour)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for name in ("a.gif", "a.png", "a.webp"):
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], lossless=True)
        assert (read(path) == (255, 0, 0)).all()


def assert_refused(path, reason: str, **options) -> None:
    with pytest.raises(PictureError, match=reason) as caught:
        read_image(path, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message


def test_missing_folder_and_foreign_files_are_refused(tmp_path):
    assert_refused(tmp_path / "none.png", "No such file")
    assert_refused(tmp_path, "Is a directory")
    (tmp_path / "empty.png").touch()
    assert_refused(tmp_path / "empty.png", "empty file")
    (tmp_path / "text.png").write_text("this is no picture\n" * 9)
    assert_refused(tmp_path / "text.png", "not a picture")


@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tif", "a.ppm"])
def test_truncated_files_are_refused_even_if_pillow_was_told_otherwise(tmp_path, monkeypatch, name, loose):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", loose)
    whole = saved(tmp_path, Image.fromarray(noise(64, 64, 3)), name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    assert_refused(tmp_path / name, "cut short")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is loose


def test_too_small_and_too_large(tmp_path, recwarn):
    assert_refused(saved(tmp_path, Image.new("RGB", (15, 40))), "15x40 is too small, both sides must be 16 or more")
    exact = saved(tmp_path, Image.new("RGB", (16, 16)))
    assert read_image(exact, max_pixels=256).shape == (3, 16, 16)
    assert_refused(exact, "more than the 255 pixels", max_pixels=255)
    limit = Image.MAX_IMAGE_PIXELS
    for side in (10_001, 60_000):
        bomb = png(tmp_path, noise(1, 1, 3), 2, side=side)
        assert_refused(bomb, f"{side}x{side} is more than the 100000000 pixels")
    assert not recwarn.list and Image.MAX_IMAGE_PIXELS == limit


def test_a_written_picture_is_read_back_and_only_as_png(tmp_path):
    picture = torch.from_numpy(noise(3, HEIGHT, WIDTH))
    write_image(tmp_path / "a.png", picture)
    assert torch.equal(read_image(tmp_path / "a.png"), picture)
    for name, told in (("a.jpg", "ends in .png"), ("none/a.png", "no folder")):
        with pytest.raises(DiffoError, match=told):
            write_image(tmp_path / name, picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_written_pictures_say_that_they_are_srgb_and_ours(tmp_path):
    picture = torch.from_numpy(noise(3, HEIGHT, WIDTH))
    write_image(tmp_path / "a.png", picture)
    assert b"\0\0\0\1sRGB\0" in (tmp_path / "a.png").read_bytes() and is_ours(tmp_path / "a.png")
    foreign = saved(tmp_path, Image.open(tmp_path / "a.png"), "b.png")
    (tmp_path / "c.png").write_bytes(b"Software DiffO")
    assert not any(map(is_ours, (foreign, tmp_path / "c.png", tmp_path / "none.png", tmp_path)))


def test_grey_values_survive_the_way_there_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    signed = to_signed(values)
    assert signed.dtype == torch.float32 and signed[[0, 51, 255]].tolist() == pytest.approx([-1, -0.6, 1])
    assert torch.equal(to_uint8(signed), values)


def test_to_uint8_clamps_rounds_halves_to_even_and_refuses_nan():
    assert to_uint8(torch.tensor([-9.0, -1.0, 1.0, 9.0, torch.inf, -torch.inf])).tolist() == [0, 0, 255, 255, 255, 0]
    # 0 is 127.5, which goes to the even 128; a little less goes down.
    assert to_uint8(torch.tensor([0.0, -0.001])).tolist() == [128, 127]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, torch.nan]))
    with pytest.raises(ValueError, match="uint8"):
        to_signed(torch.tensor([1.0]))


def test_pictures_are_found_sorted_by_suffix(tmp_path):
    for name in ("b.PNG", "a.jpeg", "c.txt", ".hidden.png", "sub/d.WebP", ".cache/e.png", "sub/.f.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [tmp_path / name for name in ("a.jpeg", "b.PNG", "sub/d.WebP")]
    assert find_pictures(tmp_path) == found
    assert find_pictures(tmp_path / "folder.png") == []
    for missing in (tmp_path / "none", tmp_path / "c.txt"):
        with pytest.raises(DiffoError, match="no such folder"):
            find_pictures(missing)
