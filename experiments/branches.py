"""Fig. 4: the base branch alone, the residual branch alone, and both.

The base branch is the denoiser's condition, from z_q; the residual branch is y^, which x~ starts from. A release that
was trained with one of them is decoded with that one. One that was trained with both is decoded three times: what a
branch adds to it then is not what a network that never had it would do without.

A release whose denoiser corrects y^ (prediction: correction) has no such branches. It is decoded with the correction and
without, D(y^).
"""

import argparse
import copy
from dataclasses import replace

from experiments.coded import Variant, at_quality, measured
from experiments.inputs import about, releases_of
from experiments.summary import beside_paper, draw_bars, origin, write_summary
from models.codec import Codec
from utils.distributed import is_main
from utils.errors import DiffoError

# label -> (detail_branch, perceptual_branch), which are the paper's residual and base branch
BRANCHES = {"base only": (False, True), "residual only": (True, False), "both": (True, True)}


def run(args: argparse.Namespace) -> None:
    """pictures.csv by picture, and the table.

    Raises:
        DiffoError: an option is wrong, or a release has no two branches, before anything is coded.
    """
    releases = releases_of(args)
    variants = [v for name, codec in releases.items() for v in variants_of(name, codec, args.quality)]
    means = measured(args, "pictures", releases, variants)
    if is_main():
        title = f"Fig. 4: branches, {args.data.name} (the paper's values: one picture, kodim23)"
        told = about(args, releases, paper=origin("paper-fig4"))
        write_summary(beside_paper(means, "paper-fig4"), args.out_path, "branches", told, title)
        draw_bars(means, args.out_path, args.metrics, ("codec", "label"), title)


def variants_of(name: str, codec: Codec, quality: float) -> list[Variant]:
    """The codec as it was trained; one with both branches also with either switched off, one that corrects y^ also
    without the correction. Errors as `run`."""
    params = codec.params
    if params.prediction == "correction":
        at_quality(name, codec, quality)
        silent = copy.deepcopy(codec)
        silent.unet.start_silent()
        return [Variant(name, "y^ alone", silent, quality), Variant(name, "corrected by U", codec, quality)]
    if params.adapter != "published":
        raise DiffoError(
            f"{name}: these branches are parts of adapter published, and it has another; name a release of "
            "configs/config.yaml, or of its like, with --weights"
        )
    at_quality(name, codec, quality)
    trained = params.detail_branch, params.perceptual_branch
    if trained != BRANCHES["both"]:
        label = next((label for label, flags in BRANCHES.items() if flags == trained), "neither branch")
        return [Variant(name, label, codec, quality)]
    variants = []
    for label, (detail, perceptual) in BRANCHES.items():
        switched = copy.copy(codec)  # the same networks
        switched.params = replace(params, detail_branch=detail, perceptual_branch=perceptual)
        variants.append(Variant(name, label, switched, quality))
    return variants
