"""The codec as functions of a program: pictures and bytes of every kind, errors, torch.hub."""

import array
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from coding.api import ImageCodec
from measuring.metrics import psnr
from models.bitstream import noise_seed, unpack
from models.released import SMALL, Triple, load_release
from release import load_codec
from tests.commands import ROOT, photograph, run
from utils.errors import BitstreamError, BudgetError, CheckpointError, DiffoError, PictureError


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    return load_codec()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return photograph(tmp_path_factory.mktemp("pictures") / "photo.png", 80, 48)


@pytest.fixture(scope="module")
def rgb(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_readmes_example_runs_in_any_folder(tmp_path):
    """As it stands, with this folder's name in it."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code.count("path/to/DiffO") == 1
    photograph(tmp_path / "photo.jpg", 64, 48)
    told = "assert image.shape == (3, 48, 64) and info['bytes'] == len(data); print(info)"
    done = run("-c", f"import os; os.chdir({str(tmp_path)!r})\n{code.replace('path/to/DiffO', str(ROOT))}\n{told}")
    assert load_release(SMALL).fingerprint.hex() in done.stdout


# Pictures -------------------------------------------------------------------------------------------------------------

KINDS = {
    "text": lambda path, rgb: str(path),
    "PIL": lambda path, rgb: Image.open(path),
    "opaque RGBA": lambda path, rgb: Image.open(path).convert("RGBA"),
    "array": lambda path, rgb: rgb,
    "array of negative stride": lambda path, rgb: np.ascontiguousarray(rgb[:, ::-1])[:, ::-1],
    "array in [0, 1]": lambda path, rgb: rgb / 255,
    "tensor": lambda path, rgb: torch.tensor(rgb).permute(2, 0, 1),
    "tensor in [0, 1] with gradient": lambda path, rgb: (torch.tensor(rgb).permute(2, 0, 1) / 255).requires_grad_(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_every_kind_has_the_file_of_its_path(codec, path, rgb, kind):
    assert codec.compress(KINDS[kind](path, rgb), quality=30) == codec.compress(path, quality=30)


def test_grey_of_every_kind(codec, rgb):
    grey = rgb[..., 0]
    expected = codec.compress(np.stack([grey] * 3, axis=2))
    for kind in (grey, torch.tensor(grey), Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)):
        assert codec.compress(kind) == expected


def test_an_image_of_pil_is_read_as_its_file_and_stays_as_it_is(codec, rgb, tmp_path):
    turned, clear = Image.fromarray(rgb), Image.fromarray(rgb)
    exif = turned.getexif()
    exif[274] = 6  # orientation: to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    clear.putalpha(Image.fromarray(np.full(rgb.shape[:2], 100, np.uint8)))
    clear.save(tmp_path / "clear.png")
    for name, size in (("turned.png", (48, 80)), ("clear.png", (80, 48))):
        image = Image.open(tmp_path / name)
        data = codec.compress(image)
        assert data == codec.compress(tmp_path / name) and image.size == (80, 48)
        assert (unpack(data).width, unpack(data).height) == size


@pytest.mark.parametrize(
    "image, told",
    [
        (7, "a int came; a picture is a path, a PIL image, a NumPy array H x W x 3 or a tensor 3 x H x W"),
        (b"\x89PNG", "a bytes came; a picture is a path"),
        (np.zeros((3, 32, 40), np.uint8), "an array 3 x 32 x 40, uint8, came; a picture is"),
        (np.zeros((32, 40, 4), np.uint8), "an array 32 x 40 x 4, uint8, came"),
        (np.zeros((32, 40, 3), np.int64), "an array 32 x 40 x 3, int64, came"),
        (torch.zeros(1, 3, 32, 40), "a tensor 1 x 3 x 32 x 40, torch.float32, came"),
        (torch.full((3, 32, 40), 255.0), "came, with values from 255 to 255; .* floating point in .0, 1."),
        (torch.full((3, 32, 40), -1.0), "came, with values from -1 to -1"),
        (np.full((32, 40), np.nan), "came, with values from nan to nan"),
        (np.zeros((0, 40), np.uint8), "an array 0 x 40, uint8, came; a picture has sides from 16"),
        (torch.zeros(3, 15, 40), "a tensor 3 x 15 x 40, torch.float32, came; a picture has sides from 16"),
        (Image.new("RGB", (15, 40)), "the PIL image: 15x40 is too small"),
        (Image.new("F", (32, 40)), "the PIL image: floating-point samples"),
        ("nowhere.png", "nowhere.png: cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_picture_is_told_with_what_came_and_what_is_wanted(codec, image, told):
    with pytest.raises(PictureError, match=told):
        codec.compress(image)


def test_more_pixels_than_allowed_are_refused(path, rgb):
    few = load_codec(max_pixels=80 * 48 - 1)
    for image in (path, Image.open(path), rgb, torch.zeros(3, 48, 80)):
        with pytest.raises(PictureError, match=r"3839 pixels|3,839 pixels"):
            few.compress(image)
    with pytest.raises(BitstreamError, match="raise max_pixels"):
        few.decompress(load_codec().compress(path))


# Rates and files ------------------------------------------------------------------------------------------------------


def test_rates_are_those_that_are_asked_for(codec, path):
    base, most = codec.compress(path), codec.compress(path, quality=100)
    assert base == codec.compress(path, quality=0) and len(base) < len(most)
    middle = (len(base) + len(most)) // 2
    found = codec.compress(path, max_bytes=middle)
    assert len(base) < len(found) <= middle and codec.info(found)["code"] > 0
    assert codec.compress(path, target_bpp=8 * middle / (80 * 48)) == found
    assert codec.compress(path, max_bytes=10**6) == most
    with pytest.raises(BudgetError, match="19 bytes .* its smallest file has"):
        codec.compress(path, max_bytes=19)


@pytest.mark.parametrize(
    "asked, told",
    [
        ({"quality": 101}, "quality 101: from 0"),
        ({"target_bpp": float("nan")}, "target_bpp nan: bits per pixel, above 0"),
        ({"target_bpp": float("inf")}, "target_bpp inf"),
        ({"max_bytes": 0}, "max_bytes 0: bytes of the file, from 1"),
        ({"max_bytes": float("nan")}, "max_bytes nan"),
        ({"quality": 0, "max_bytes": 3000}, "quality and max_bytes contradict each other"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_value_errors(codec, path, asked, told):
    with pytest.raises(ValueError, match=told):
        codec.compress(path, **asked)


def test_an_argument_that_is_no_number_is_a_type_error(codec, path):
    for asked in ({"quality": "40"}, {"target_bpp": "0.06"}, {"max_bytes": [3000]}):
        with pytest.raises(TypeError, match=f"^{next(iter(asked))} .*: a number is wanted$"):
            codec.compress(path, **asked)
    assert codec.compress(path, max_bytes=np.int64(300)) == codec.compress(path, max_bytes=300)
    data = codec.compress(path)
    with pytest.raises(TypeError, match="^texture 'all': a number is wanted$"):
        codec.decompress(data, texture="all")


def test_bytes_of_every_kind(codec, path, rgb):
    data = codec.compress(path, quality=50)
    image = codec.decompress(data)
    assert image.dtype == torch.uint8 and psnr(torch.tensor(rgb).permute(2, 0, 1), image) > 14
    wide = memoryview(np.repeat(np.frombuffer(data, np.uint8), 2))[::2]  # not contiguous
    for kind in (bytearray(data), memoryview(data), array.array("B", data), np.frombuffer(data, np.uint8), wide):
        assert torch.equal(codec.decompress(kind), image) and codec.info(kind) == codec.info(data)
    for kind, told in (("photo.dfo", "a str came; a file is given as its bytes"), ([1, 2], "a list came")):
        with pytest.raises(BitstreamError, match=told):
            codec.decompress(kind)


def test_a_cut_file_is_refused_with_what_a_caller_can_do(codec, path):
    data = codec.compress(path, quality=50)
    for work in (codec.decompress, codec.info):
        with pytest.raises(BitstreamError, match="preview=True"):
            work(data[:-5])
    base = codec.compress(path)
    assert noise_seed(unpack(base).base) == noise_seed(unpack(data[:-5], preview=True).base)
    preview = codec.decompress(data[:-5], preview=True)
    assert torch.equal(preview, codec.decompress(base))


def test_info_says_where_the_bits_are(codec, path):
    for quality in (0, 50):
        data = codec.compress(path, quality=quality)
        info = codec.info(data)
        parts = [info.get(f"{part}_bits", 0) for part in ("header", "base", "hyper", "residual", "check")]
        assert sum(parts) == 8 * len(data) == 8 * info["bytes"] and bool(quality) == (info["code"] > 0)
        assert (info["width"], info["height"], info["version"]) == (80, 48, 1)
        assert info["bpp"] == 8 * len(data) / (80 * 48) and abs(info["estimated_bits"] - 8 * len(data)) < 64
        assert info["fixed_length_base_bits"] == 5 * 3 * 11  # 2,048 codes


def test_a_file_of_other_weights_has_its_sizes_and_no_picture(codec, path):
    data = codec.compress(path)
    other = load_codec()
    other.model.fingerprint = b"none"
    assert other.info(data)["weights"] == codec.model.fingerprint.hex() and "estimated_bits" not in other.info(data)
    with pytest.raises(CheckpointError, match="the file was written with the weights"):
        other.decompress(data)


# Weights and devices --------------------------------------------------------------------------------------------------


def test_weights_and_devices_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no release there"):
        load_codec(tmp_path)
    with pytest.raises(CheckpointError, match="no release there"):
        load_codec("")  # of a variable that is not set, say
    for wrong in ({"precision": "fp16"}, {"decoder": "small"}, {"without": ["graphs", "grahps"]}):
        with pytest.raises(
            ValueError, match="(fp16|small|grahps)': (auto, float32, bfloat16|full, light|fused_norm, graphs)$"
        ):
            load_codec(**wrong)
    with pytest.raises(DiffoError, match="device tpu: not one of auto, cpu"):
        load_codec(device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(DiffoError, match="^device cuda: PyTorch finds no CUDA device here; use cpu$"):
            load_codec(device=torch.device("cuda"))
    unet = Triple.in_folder(SMALL).unet
    (tmp_path / unet.name).write_bytes(unet.read_bytes()[:-1000])
    for path in (Triple.in_folder(SMALL).vq_base, Triple.in_folder(SMALL).autoencoder):
        shutil.copy(path, tmp_path)
    with pytest.raises(CheckpointError, match=f"{unet.name}: not a checkpoint, cut short or damaged"):
        load_codec(str(tmp_path))


OWN_PACKAGES = """
import sys, torch, utils, numpy as np
codec = torch.hub.load(sys.argv[1], "diffo", source="local", weights="mine", device="cpu")
assert utils.mine and sys.modules["utils"] is utils
import models, datapipe.mine  # after it, and not ours
assert models.mine and datapipe.mine.mine
data = codec.compress(np.zeros((20, 30, 3), np.uint8), quality=20)
assert codec.decompress(data).shape == (3, 20, 30) and codec.info(data)["width"] == 30
try:
    codec.decompress(data[:9])
except codec.Error as error:
    print(error)
again = torch.hub.load(sys.argv[1], "diffo", source="local")
assert again.compress(np.zeros((20, 30, 3), np.uint8), quality=20) == data
"""


def test_a_caller_with_packages_of_the_same_names_keeps_them(tmp_path):
    """Imported before and after, as a package, a file and a folder."""
    for name in ("utils/__init__.py", "models.py", "datapipe/mine.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine = True\n")
    (tmp_path / "mine").symlink_to(SMALL)
    code = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
    assert run("-c", code + OWN_PACKAGES, ROOT).stdout == "the file is cut within its header, after 9 bytes\n"
