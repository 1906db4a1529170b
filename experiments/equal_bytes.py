"""Two releases at equal bytes: one codes a picture, the other takes at most as many bytes for it."""

import argparse
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from coding import budget
from coding.report import Row, aligned_table, mean_row
from coding.table import write_rows
from experiments.inputs import codec_of, photographs
from measuring.metrics import MS_SSIM_MIN_SIDE, bpp, ms_ssim, psnr
from models.codec import Codec
from models.released import load_release
from utils.errors import BudgetError, PictureError
from utils.images import read_image


def run(args: argparse.Namespace) -> None:
    """Every picture against every rival: rows in equal_bytes.csv, and their means as a table.

    Raises:
        DiffoError: an option is wrong, before anything is coded; or as `contest`.
    """
    pictures = photographs(args.data)
    ours = codec_of(args)
    rivals = [(folder.name, load_release(folder, ours.device)) for folder in args.against]
    rows, means = [], []
    for rival, theirs in rivals:
        pairs = [contest(ours, theirs, rival, path) for path in tqdm(pictures, desc=rival, unit="picture")]
        won = sum(our["ms_ssim"] > their["ms_ssim"] for their, our in pairs)
        for side, better in zip(zip(*pairs, strict=True), (len(pairs) - won, won), strict=True):
            means.append(mean_row(side) | {"weights": side[0]["weights"], "won": f"{better} of {len(pairs)}"})
        rows += [row for pair in pairs for row in pair]
    write_rows(rows, args.out_path / "equal_bytes.csv")
    print(aligned_table(means))


def contest(ours: Codec, theirs: Codec, rival: str, path: Path) -> tuple[Row, Row]:
    """Code a picture with the base code of `theirs`, then with `ours` in at most as many bytes: a row of each.

    Args:
        rival: what to call `theirs` in the rows.
    Raises:
        BudgetError: the rival's file is smaller than the smallest that ours can make.
        PictureError: the picture cannot be read, or is smaller than MS-SSIM needs.
    """
    image = read_image(path)
    if min(image.shape[1:]) < MS_SSIM_MIN_SIDE:
        raise PictureError(f"{path}: MS-SSIM, which decides, needs sides from {MS_SSIM_MIN_SIDE} pixels")
    data = theirs.compress(image)
    try:
        fitted = budget.fit(ours, ours.analyse(image), len(data))
    except BudgetError as error:
        raise BudgetError(f"{path}, as coded by {rival}: {error}") from error
    named = {"picture": path.name, "note": None}
    their = named | {"weights": rival, "code": 0} | scores(image, theirs.decompress(data), data)
    our = named | {"weights": f"two layers within {rival}", "code": fitted.code, "note": fitted.note}
    return their, our | scores(image, ours.decompress(fitted.data), fitted.data)


def scores(image: Tensor, decoded: Tensor, file: bytes) -> Row:
    """Size of a file, and PSNR and MS-SSIM of what it decodes to; pictures uint8 (3, H, W)."""
    size = {"bytes": len(file), "bpp": bpp(len(file), *image.shape[1:])}
    return size | {"psnr": psnr(image, decoded), "ms_ssim": ms_ssim(image, decoded)}
