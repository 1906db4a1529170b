"""Two releases at equal bytes: one codes a picture, the other takes at most as many bytes for it."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from coding import budget
from coding.report import Row, aligned_table, mean_row, write_rows
from experiments.inputs import codec_of, photographs
from measuring.metrics import MS_SSIM_MIN_SIDE, bpp, ms_ssim, psnr
from models.codec import Codec
from models.released import load_codec
from utils.errors import BudgetError, PictureError
from utils.images import read_image


def run(args: argparse.Namespace) -> None:
    """Every picture against every rival: rows in equal_bytes.csv, and their means as a table.

    Raises:
        DiffoError: an option is wrong, before anything is coded; or as `contest`.
    """
    pictures = photographs(args.data)
    ours = codec_of(args)
    rivals = [(folder.name, load_codec(folder, ours.device)) for folder in args.against]
    rows, means = [], []
    for name, theirs in rivals:
        found = contest(ours, theirs, name, pictures)
        rows += [row for pair in zip(found.theirs, found.ours, strict=True) for row in pair]
        means += found.means()
    write_rows(rows, args.out_path / "equal_bytes.csv")
    print(aligned_table(means))


@dataclass(frozen=True)
class Contest:
    """The same pictures in the same order: rows of the rival, and rows of ours within its bytes."""

    theirs: list[Row]
    ours: list[Row]

    @property
    def won(self) -> int:
        """Pictures of which ours have the higher MS-SSIM."""
        return sum(our["ms_ssim"] > their["ms_ssim"] for our, their in zip(self.ours, self.theirs, strict=True))

    def means(self) -> list[Row]:
        """Two rows: the rival's means and ours, and how many pictures each won."""
        count = len(self.ours)
        return [
            mean_row(rows) | {"weights": rows[0]["weights"], "won": f"{won} of {count}"}
            for rows, won in ((self.theirs, count - self.won), (self.ours, self.won))
        ]


def contest(ours: Codec, theirs: Codec, rival: str, pictures: list[Path]) -> Contest:
    """Code every picture with the base code of `theirs`, then with `ours` in at most as many bytes.

    Args:
        rival: what to call `theirs` in the rows.
    Raises:
        BudgetError: the rival's file of a picture is smaller than the smallest that ours can make.
        PictureError: one cannot be read, or is smaller than MS-SSIM needs.
    """
    found = Contest([], [])
    for path in tqdm(pictures, desc=rival, unit="picture"):
        image = read_image(path)
        if min(image.shape[1:]) < MS_SSIM_MIN_SIDE:
            raise PictureError(f"{path}: MS-SSIM, which decides, needs sides from {MS_SSIM_MIN_SIDE} pixels")
        data = theirs.compress(image)
        try:
            fitted = budget.fit(ours, ours.analyse(image), len(data))
        except BudgetError as error:
            raise BudgetError(f"{path}, as coded by {rival}: {error}") from error
        for codec, rows, file, level, name in (
            (theirs, found.theirs, data, 0, rival),
            (ours, found.ours, fitted.data, fitted.level, f"two layers within {rival}"),
        ):
            rows.append({"weights": name, "picture": path.name, "level": level, "note": None})
            rows[-1] |= scores(image, codec.decompress(file), file)
        found.ours[-1]["note"] = fitted.note
    return found


def scores(image: Tensor, decoded: Tensor, file: bytes) -> Row:
    """Size of a file, and PSNR and MS-SSIM of what it decodes to; pictures uint8 (3, H, W)."""
    size = {"bytes": len(file), "bpp": bpp(len(file), *image.shape[1:])}
    return size | {"psnr": psnr(image, decoded), "ms_ssim": ms_ssim(image, decoded)}
