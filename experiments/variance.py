"""Fig. 9a: variance of the latent, of what the base loses of it, of what is lost after the residual, and of the noise.

As the rate rises less of the latent is left to the denoiser, which is why the noise may fall with it (Eq. 11). What the
figure's own axes are could not be checked against the paper.
"""

import argparse
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from coding.report import Row
from experiments.coded import curve_of, fill, table_of
from experiments.inputs import about, checksum, named_photographs, releases_of
from experiments.summary import write_summary
from measuring.charts import Curve, chart
from measuring.metrics import bpp
from models.codec import Codec
from models.records import ONE_STEP
from utils.distributed import is_main
from utils.errors import DiffoError
from utils.images import read_image, to_signed

KINDS = {
    "latent": "x, the latent",
    "base_lost": "x - y, what the base loses",
    "lost": "x - y^, what is lost with the residual",
    "denoised_lost": "x - x^, what is lost after the denoiser",
    "noise": "kappa^2 eta, the noise",
}


def run(args: argparse.Namespace) -> None:
    """pictures.csv, the means by quality, and a chart over the rate.

    Raises:
        DiffoError: an option is wrong, before anything is coded.
    """
    releases = releases_of(args)
    (name, codec), *others = releases.items()
    if others:
        raise DiffoError("--weights: variances are of one release; name one")
    labels = {variant.label: variant.quality for variant in curve_of(name, codec, args.qualities)}
    pictures = named_photographs(args.data, args.limit)
    with table_of(args, "pictures", releases, ("label", "picture")) as table:
        jobs = []
        for picture, path in pictures.items():
            made_from = f"weights {codec.fingerprint.hex()}, picture {checksum(path)}"
            old = {label: table.get(label, picture) for label in labels}
            todo = {k: q for k, q in labels.items() if not old[k] or old[k]["made_from"] != made_from}
            if todo:
                jobs.append(partial(variances, codec, picture, path, todo, made_from))
        fill(table, jobs, name)
        rows = {label: [table.get(label, picture) for picture in pictures] for label in labels}
    if not is_main():
        return
    means = [
        {"label": label, "pictures": len(found)} | {key: fmean(row[key] for row in found) for key in ("bpp", *KINDS)}
        for label, found in rows.items()
    ]
    title = f"Fig. 9a: variances in the latent, {name}, {args.data.name}"
    write_summary(means, args.out_path, "variance", about(args, releases, kinds=KINDS), title)
    rates = [mean["bpp"] for mean in means]
    curves = [Curve(told, rates, [mean[kind] for mean in means]) for kind, told in KINDS.items()]
    chart(curves, args.out_path / "variance.png", "bits per pixel (files)", "variance per value", title)


@torch.inference_mode()
def variances(codec: Codec, picture: str, path: Path, labels: dict[str, float], made_from: str) -> list[Row]:
    """A row for every quality of one picture: mean squares over the latent's values; of x, about its channels' means."""
    image, rows = read_image(path), []
    analysed = codec.analyse(image)
    x = codec.to_latent(to_signed(image).to(codec.device)[None])
    for label, quality in labels.items():
        data = codec.write(analysed, codec.level_code(quality))
        contents = codec.read(data)
        y_hat, z_q = codec.known([contents])
        x_hat, (eta,) = codec.denoise(y_hat, z_q, [contents.file], ONE_STEP)
        row = {"label": label, "picture": picture, "made_from": made_from, "bpp": bpp(len(data), *image.shape[1:])}
        row["latent"] = x.var(dim=(2, 3), correction=0).mean().item()
        for kind, part in (("base_lost", analysed.y), ("lost", y_hat), ("denoised_lost", x_hat)):
            row[kind] = (x - part).square().mean().item()
        rows.append(row | {"noise": codec.schedule.kappa**2 * eta})
    return rows
