"""The image autoencoder alone, D(E(X)): no file can be better. Beside it, the best linear map of as many channels."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from coding.report import Row
from experiments.coded import KEY, evaluator_of, fill, table_of
from experiments.inputs import about, checksum, named_photographs, photographs, releases_of, weights_of
from experiments.summary import mean_of, write_summary
from measuring.evaluator import Evaluator
from models.autoencoder import Autoencoder, AutoencoderParams, fit_linear
from models.bitstream import CELL
from utils.distributed import is_main
from utils.images import read_image, to_signed, to_uint8

RESTORED, COMPONENTS = "D(E(X))", "principal components"


def run(args: argparse.Namespace) -> None:
    """pictures.csv, and means for each release, beside those of principal components where --fit names pictures.

    Raises:
        DiffoError: an option is wrong, before any picture is restored; a picture cannot be read.
    """
    releases, evaluator = releases_of(args, args.decoder), evaluator_of(args)
    pictures = named_photographs(args.data, args.limit)
    ways = {(name, RESTORED): (codec.autoencoder, codec.picture) for name, codec in releases.items()}
    made_from = {(name, RESTORED): weights_of(codec) for name, codec in releases.items()}
    for channels in sorted({codec.params.autoencoder.embed_dim for codec in releases.values()}) if args.fit else ():
        point = (f"{channels} channels", COMPONENTS)
        network = components(photographs(args.fit), channels)
        ways[point], made_from[point] = (network, network.decode), f"{channels}, {args.fit}"
    with table_of(args, "pictures", releases) as table:
        for point, way in ways.items():
            jobs = []
            for name, path in pictures.items():
                row: Row = dict(zip(KEY, (*point, name), strict=True))
                row["made_from"] = f"{made_from[point]}, picture {checksum(path)}"
                old = table.get(*point, name) or {}
                row = old if old.get("made_from") == row["made_from"] else row
                if not all(score in row for score in ("bytes", *evaluator.names)):
                    jobs.append(partial(scored, *way, path, evaluator, row))
            fill(table, jobs, " ".join(point))
        means = [mean_of([table.get(*point, name) for name in pictures], evaluator.names) for point in ways]
    if is_main():
        means = [{key: mean.get(key) for key in mean if key not in ("reached", "scale", "bytes")} for mean in means]
        title = f"The image autoencoder alone, {args.data.name}"
        write_summary(means, args.out_path, "ceiling", about(args, releases), title)


def components(pictures: list[Path], channels: int) -> Autoencoder:
    """An autoencoder that is nothing but its linear shortcut: the principal components of the pictures' 16x16 blocks."""
    blank = dict(ch=8, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8, n_embed=0, groups=1, patch=4)
    network = Autoencoder(AutoencoderParams(**blank, embed_dim=channels, shortcut="linear")).eval()
    signed = (to_signed(read_image(path)) for path in pictures)
    fit_linear(network, (x[None, :, : x.shape[1] // CELL * CELL, : x.shape[2] // CELL * CELL] for x in signed))
    return network


@torch.inference_mode()
def restored(network: Autoencoder, decode: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """D(E(X)), D being `decode`, of uint8 (3, H, W), padded by edge values to whole cells."""
    height, width = image.shape[1:]
    device = network.quant_conv.weight.device
    padded = F.pad(to_signed(image)[None].to(device), (0, -width % CELL, 0, -height % CELL), mode="replicate")
    return to_uint8(decode(network.encode(padded))[0, :, :height, :width]).cpu()


def scored(
    network: Autoencoder, decode: Callable[[Tensor], Tensor], path: Path, evaluator: Evaluator, row: Row
) -> list[Row]:
    """The row of one picture, with its scores; `bytes` is 0, since there is no file."""
    image = read_image(path)
    return [row | {"bytes": 0} | evaluator(image, restored(network, decode, image))]
