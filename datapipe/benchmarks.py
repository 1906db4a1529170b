"""The test sets of the literature, fetched for users who are online: Kodak and CLIC2020.

Checksums are those that the TensorFlow Datasets catalogue (CLIC2020) and many projects that pin Kodak agree on.
"""

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from tqdm import tqdm

from utils.download import fetch
from utils.errors import DiffoError
from utils.files import atomic_write, make_folder
from utils.images import read_image, write_image

CROP = 768  # pixels; of CLIC2020 in the papers on diffusion codecs, this one among them


@dataclass(frozen=True)
class Remote:
    """A file on a server, its SHA-256, and how many pictures it holds."""

    url: str
    sha256: str
    pictures: int = 1

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


_KODAK_SHA256 = """
a56e27cbf5f843c048b6af1d6e090760e9c92fadba88b7dee0205918a37523bd
4f4b74a79237e311d72cad958237b5f7088d8bce1c82305ebefe1a70e3022dfd
e25ca1ff2f0c0cb5fdfd5f9b0a0bb21ac4c3de3c84a67f35b09a85d3306249db
e3b946107c5d3441c022f678d0c3caf1e224d81b1604ba840a4f88e562de61aa
10349e963c5c813d327852f82c1795fa4148d69fedffc4c589bee458e3ac3d53
363510303b715d4cbc384e1ce227e466b613a09e1b71ae985882bf8e7fbd9b18
b77d3f006f42414bb242222e0482e750c0fb9e5ee8d4bed2f6f11c5605fe54a4
ba23983c76b4832ee0e8af0592664756841a16779acd69f792e268fb6d13d6e7
6a4361c2fc194feb4edaa9f9a4a0620fb9943e460ac7fdf037fb0f6dd6607a7d
9dfb70f5867c29ff9ed6313683f19b3d867849e40fbc0c4c54a4a89df341cf23
7936814b58b5387fce2e4e2488b4ec830dadd95fa9520f358ddb30990b50f2b6
d78c37c2f04f23761ed2367dd77e2db584ddd4c3950833fecf89f199a8126980
bc34a3ce58dea09dce1704c997171602de90cb34d0c8503a988b77f473d39b08
55a94550ff18f3246c4074fd32b77b0c74447c26b6ad274d564d999c0450ba6e
7538cbb80cb9103606c48b806eae57d56c885c7f90b9b3be70a41160f9cbb683
a89c7268ccd4718ba424a99fc4643c572cf692ca6eae887185ceb4e9f11d2e54
37afcc89fbdcb76d9518e04b2fc011027e2f4cd14b3b2f83cefd721641a47c5b
1a9258c365988961d87a0598725b609139c303ad48a5aad6c503c3b1a87849aa
b7450b264b1b0a411390d8931b112c27905a992520fc90569dc4b920aa32bbdc
3b46c71e3b92a563820ba32936be8330c586c41f938efd94be938386aae4328a
ac958597c82073f6bb65129c68f72b651db5b9efd82e11547d07350214bc268b
1cee58eb1f2d9c7ebb254d208a03c783ce6cf2c4d8c2cf45e235dd23b4ce1b29
e3111a2fd4da24af15d6459ef9eacfe54106b38e27b4a21821b75c3f5d2d5baf
1071c68372cc5a01435c2c225a5cf7d4bb803846ec08bb6b3d6721b156d7cb96
""".split()

_CLIC = "https://data.vision.ee.ethz.ch/cvl/clic/test"

KODAK = tuple(
    Remote(f"https://r0k.us/graphics/kodak/kodak/kodim{number:02d}.png", sha256)
    for number, sha256 in enumerate(_KODAK_SHA256, 1)
)
CLIC2020 = (
    Remote(
        f"{_CLIC}/CLIC2020Professional_test.zip",
        "857df244fc2bfa5da28d4c66bf0db16ee99bfc79eb807be8afa89cd507852884",
        250,
    ),
    Remote(
        f"{_CLIC}/CLIC2020Mobile_test.zip",
        "2025f07a6c652270e534640de4271feef3b3dd3260beed4ac4821064837aa732",
        178,
    ),
)


def download_kodak(folder: Path, timeout: float, base_url: str | None, report: Callable[[str], None]) -> None:
    """The 24 pictures of Kodak into `folder`. Raises DiffoError."""
    for remote in KODAK:
        obtain(remote, folder, timeout, base_url, report)
    report(f"{folder}: {len(KODAK)} pictures of Kodak")


def download_clic2020(folder: Path, timeout: float, base_url: str | None, report: Callable[[str], None]) -> None:
    """The 428 pictures of the CLIC2020 test set into `folder/full`, cropped to 768x768 into `folder/768`.

    The archives stay in `folder/archives`. Raises DiffoError.
    """
    archives = [obtain(remote, folder / "archives", timeout, base_url, report) for remote in CLIC2020]
    names: list[str] = []
    for remote, path in zip(CLIC2020, archives, strict=True):
        found = extract(path, folder / "full")
        if len(found) != remote.pictures:
            raise DiffoError(f"{path}: holds {len(found)} pictures, the test set has {remote.pictures}")
        names += found
    if len(set(names)) != len(names):
        raise DiffoError(f"{folder / 'archives'}: both archives hold a picture of the same name")
    make_folder(folder / str(CROP))
    for name in tqdm(names, desc=f"cropping to {CROP}x{CROP}", disable=None):
        target = folder / str(CROP) / name
        if not target.is_file():
            write_image(target, centre_crop(read_image(folder / "full" / name), CROP))
    report(f"{folder}: {len(names)} pictures of the CLIC2020 test set, whole in full, {CROP}x{CROP} in {CROP}")


def obtain(remote: Remote, folder: Path, timeout: float, base_url: str | None, report: Callable[[str], None]) -> Path:
    """A remote file in `folder`, fetched if it is not there, its checksum compared.

    Args:
        base_url: of another server that has a file of this name.
    Raises:
        DiffoError: the file cannot be fetched, or one is there with another checksum.
    """
    path = folder / remote.name
    there = path.is_file()
    if there:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != remote.sha256:
                raise DiffoError(f"{path}: its SHA-256 is not {remote.sha256}; remove the file, run again")
    else:
        fetch(f"{base_url.rstrip('/')}/{remote.name}" if base_url else remote.url, path, remote.sha256, timeout)
    report(f"{path}: {'already there' if there else 'fetched'}, SHA-256 agrees")
    return path


def extract(archive: Path, folder: Path) -> list[str]:
    """Put the PNG pictures of a zip archive into a folder, without the archive's own folders; their names.

    Pictures that are there already, as long as the archive's, are kept. Raises DiffoError if the archive is damaged.
    """
    make_folder(folder)
    names = []
    try:
        with zipfile.ZipFile(archive) as file:
            for info in tqdm(file.infolist(), desc=f"unpacking {archive.name}", disable=None):
                inside = PurePosixPath(info.filename)
                if info.is_dir() or inside.suffix.lower() != ".png" or inside.name.startswith("."):
                    continue
                target = folder / inside.name
                if not (target.is_file() and target.stat().st_size == info.file_size):
                    atomic_write(target, file.read(info))
                names.append(inside.name)
    except (zipfile.BadZipFile, OSError) as error:
        raise DiffoError(f"{archive}: damaged or not a zip archive ({error})") from error
    return names


def centre_crop(picture: torch.Tensor, side: int) -> torch.Tensor:
    """Scale a picture, uint8 (3, H, W), until its short side is `side` pixels, then cut the central square: (3, s, s).

    The papers do not name the filter; this is Pillow's bicubic one, which averages when it reduces.
    """
    height, width = picture.shape[1:]
    short = min(height, width)
    size = round(width * side / short), round(height * side / short)
    image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
