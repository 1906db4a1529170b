"""Every table and figure that the inputs at hand allow, each in a folder of its own in --out_path, and their report."""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from experiments import (
    ablation,
    artefacts,
    branches,
    ceiling,
    crops,
    equal_bytes,
    eta,
    rates,
    report,
    table1,
    table2,
    timing,
    variance,
)
from experiments.coded import at_quality, evaluator_of
from experiments.inputs import named_photographs, photographs, releases_of, spread
from measuring.scores import unavailable
from utils.distributed import is_main
from utils.errors import DiffoError


def run(args: argparse.Namespace) -> None:
    """The commands one after the other; what is left out is said, with what it lacks.

    Raises:
        DiffoError: an option is wrong, before anything is coded; or as the commands do.
    """
    plan = list(commands(args))
    if is_main():
        for module, _, lacks in plan:
            if lacks:
                print(f"left out: {_name(module)} {lacks}", file=sys.stderr)
    for module, options, lacks in plan:
        if not lacks:
            if is_main():
                print(f"\n{_name(module)}")
            changed = vars(args) | {"out_path": args.out_path / _name(module)} | options
            module.run(argparse.Namespace(**changed))


def commands(args: argparse.Namespace) -> Iterator[tuple[ModuleType, dict, str | None]]:
    """Each command's module, the options that are its own, and, where it cannot be run, what it lacks."""
    releases, pictures = releases_of(args), named_photographs(args.data, args.limit)
    evaluator_of(args)
    rates.baselines_for(args, releases_of(args, args.decoder))
    first = args.weights[:1] if args.weights else None
    for module in (rates, table1):
        yield module, {}, None
    found = ablation.gathered(args.releases) if args.releases else {}
    stepped = by_steps(found, args.reference)
    yield table2, {"weights": stepped}, None if stepped else "needs releases of steps-1, steps-2, ... in --releases"
    branched, lacks = [], None
    for name, codec in releases.items():
        try:
            branches.variants_of(name, codec, args.quality)
            branched.append(name)
        except DiffoError as error:
            lacks = str(error)
    chosen = [folder for folder in args.weights or [] if folder.resolve().name in branched]
    yield branches, {"weights": chosen}, None if chosen else lacks
    lacks = unavailable(args.metric) if args.held_out else "needs --held_out"
    if args.held_out:
        photographs(args.held_out, args.limit)
    yield eta, {"weights": first and first[0], "store": None}, lacks
    for name, codec in releases.items():
        at_quality(name, codec, args.quality)
    steady = [name for name in args.codecs if name != "jpeg2000"]  # whose setting is the number of bytes
    yield variance, {"codecs": steady}, None
    reference = None if args.reference in found else f"needs a release of {args.reference} in --releases (--reference)"
    yield ablation, {}, reference
    if args.fit:
        photographs(args.fit)
    for module in (ceiling, artefacts):
        yield module, {}, None
    lower = {name: spread(sorted(getattr(args, name)), 3)[:2] for name in ("qualities", "bpp")}
    yield crops, {"demo": False} | lower, too_small(args)
    yield timing, {"data": next(iter(pictures.values())), "config": None}, None
    if args.against:
        equal_bytes.rivals_of(args, next(iter(releases.values())))
    yield equal_bytes, {"weights": first}, None if args.against else "needs --against"
    yield report, {"out_path": args.out_path, "demo": False}, None


def too_small(args: argparse.Namespace) -> str | None:
    """Why there are no crops of the middles of --data. Raises DiffoError for crops that are named, and cannot be had."""
    try:
        crops.crops_of(args.crops, named_photographs(args.data), args.side)
    except DiffoError as error:
        if args.crops:
            raise
        return str(error)


def by_steps(releases: dict[str, Path], reference: str) -> list[Path]:
    """Of releases by name, those that the paper's Table 2 is made of, at the size of the reference run."""
    family = "small-steps" if reference.startswith("small-") else "steps"
    return [folder for name, folder in releases.items() if re.fullmatch(rf"{family}-\d+", name)]


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]
