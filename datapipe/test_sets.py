"""Sets of the literature, fetched for users who are online: Kodak, CLIC2020 and DIV2K to measure on, COCO to train on.

Checksums are those of the TensorFlow Datasets catalogue, and for Kodak those that many projects pin.
"""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from utils.download import fetch
from utils.errors import DiffoError
from utils.files import atomic_path, make_folder
from utils.images import find_pictures, read_image, to_pillow

CROP = 768  # pixels; of CLIC2020 in the papers on diffusion codecs, DiffO (Section 4) among them


@dataclass(frozen=True)
class Remote:
    """A file on a server, and the hexadecimal digits that its SHA-256 begins with."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


_KODAK_SHA256 = """
a56e27cbf5f843c0 4f4b74a79237e311 e25ca1ff2f0c0cb5 e3b946107c5d3441 10349e963c5c813d 363510303b715d4c
b77d3f006f42414b ba23983c76b4832e 6a4361c2fc194feb 9dfb70f5867c29ff 7936814b58b5387f d78c37c2f04f2376
bc34a3ce58dea09d 55a94550ff18f324 7538cbb80cb91036 a89c7268ccd4718b 37afcc89fbdcb76d 1a9258c365988961
b7450b264b1b0a41 3b46c71e3b92a563 ac958597c82073f6 1cee58eb1f2d9c7e e3111a2fd4da24af 1071c68372cc5a01
""".split()
KODAK = tuple(
    Remote(f"https://r0k.us/graphics/kodak/kodak/kodim{number:02d}.png", sha256)
    for number, sha256 in enumerate(_KODAK_SHA256, 1)
)
_CLIC = "https://data.vision.ee.ethz.ch/cvl/clic/test"
CLIC2020 = (  # 250 and 178 pictures
    Remote(
        f"{_CLIC}/CLIC2020Professional_test.zip", "857df244fc2bfa5da28d4c66bf0db16ee99bfc79eb807be8afa89cd507852884"
    ),
    Remote(f"{_CLIC}/CLIC2020Mobile_test.zip", "2025f07a6c652270e534640de4271feef3b3dd3260beed4ac4821064837aa732"),
)
DIV2K = (  # 100 pictures
    Remote(
        "https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_valid_HR.zip",
        "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc",
    ),
)
COCO = (  # 118,287 pictures
    Remote(
        "http://images.cocodataset.org/zips/train2017.zip",
        "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    ),
)


def download_kodak(folder: Path, report: Callable[[str], None]) -> None:
    """The 24 pictures of Kodak into `folder`. Raises DiffoError."""
    for remote in KODAK:
        obtain(remote, folder, report)


def download_clic2020(folder: Path, report: Callable[[str], None]) -> None:
    """The 428 pictures of the CLIC2020 test set, professional and mobile, whole and cropped, as `unpack` and `crop` do."""
    unpack(CLIC2020, folder, report)
    crop(folder, report)


def download_div2k(folder: Path, report: Callable[[str], None]) -> None:
    """The 100 pictures of DIV2K's validation set, as `download_clic2020`.

    DiffO does not measure on it. MS-ILLM and StableCodec take whole pictures; crops are of the protocol for CLIC2020.
    """
    unpack(DIV2K, folder, report)
    crop(folder, report)


def download_coco(folder: Path, report: Callable[[str], None]) -> None:
    """The training pictures of COCO 2017, whole: photographs to train on that need no account, as ImageNet does."""
    unpack(COCO, folder, report)


SETS = {"kodak": download_kodak, "clic2020": download_clic2020, "div2k": download_div2k, "coco": download_coco}


def unpack(remotes: Sequence[Remote], folder: Path, report: Callable[[str], None]) -> None:
    """Archives into `folder/archives`, where they stay, and their pictures into `folder/full`. Raises DiffoError."""
    for remote in remotes:
        archive = obtain(remote, folder / "archives", report)
        with zipfile.ZipFile(archive) as file:
            for member in tqdm(file.infolist(), desc=f"unpacking {remote.name}", disable=None):
                file.extract(member, folder / "full")
    report(f"{folder / 'full'}: {len(find_pictures(folder / 'full'))} pictures")


def crop(folder: Path, report: Callable[[str], None]) -> None:
    """The pictures of `folder/full`, their short side scaled to 768 pixels, their central squares into `folder/768`.

    The papers do not name the filter; this is Pillow's bicubic one, which averages when it reduces. Raises DiffoError.
    """
    crops = make_folder(folder / str(CROP))
    pictures = find_pictures(folder / "full")
    for path in tqdm(pictures, desc=f"cropping to {CROP}x{CROP}", disable=None):
        with atomic_path(crops / path.name) as temporary:
            square = ImageOps.fit(to_pillow(read_image(path)), (CROP, CROP), Image.Resampling.BICUBIC)
            square.save(temporary, "png")
    report(f"{crops}: {len(pictures)} crops, {CROP}x{CROP}")


def obtain(remote: Remote, folder: Path, report: Callable[[str], None]) -> Path:
    """A remote file in `folder`, fetched if it is not there, its checksum compared.

    Raises:
        DiffoError: the file cannot be fetched, or one is there with another checksum.
    """
    path = folder / remote.name
    if there := path.is_file():
        with path.open("rb") as file:
            if not hashlib.file_digest(file, "sha256").hexdigest().startswith(remote.sha256):
                raise DiffoError(f"{path}: its SHA-256 does not begin with {remote.sha256}; remove the file, run again")
    else:
        fetch(remote.url, path, remote.sha256)
    report(f"{path}: {'already there' if there else 'fetched'}, SHA-256 agrees")
    return path
