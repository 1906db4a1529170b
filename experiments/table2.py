"""Table 2: releases trained with 1 to 50 steps, each decoded with its own, and the one of two steps decoded with one."""

import argparse

from experiments.coded import Variant, at_quality, measured
from experiments.inputs import about, releases_of
from experiments.rates import THE_PAPERS
from experiments.summary import beside_paper, draw_bars, origin, write_summary
from models.records import Sampling
from utils.distributed import is_main
from utils.errors import DiffoError


def run(args: argparse.Namespace) -> None:
    """pictures.csv by picture, and the table: a row for each number of steps among --weights.

    Raises:
        DiffoError: an option is wrong, or two releases have as many steps, before anything is coded.
    """
    releases = releases_of(args)
    by_steps: dict[int, str] = {}
    for name, codec in releases.items():
        steps = codec.params.diffusion.steps
        at_quality(name, codec, args.quality)
        if (other := by_steps.setdefault(steps, name)) != name:
            raise DiffoError(f"--weights: {other} and {name} were both trained with {steps} steps; leave out one")
    variants = [
        Variant(name, f"{steps} step{'s' * (steps > 1)}", releases[name], args.quality, Sampling(steps))
        for steps, name in sorted(by_steps.items())
    ]
    if 2 in by_steps:
        variants.append(Variant(by_steps[2], THE_PAPERS, releases[by_steps[2]], args.quality))
    means = measured(args, "pictures", releases, variants)
    if is_main():
        title = f"Table 2: steps of the schedule, {args.data.name}"
        told = about(args, releases, paper=origin("paper-table2"))
        write_summary(beside_paper(means, "paper-table2"), args.out_path, "table2", told, title)
        draw_bars(means, args.out_path, args.metrics, ("label",), title)
