"""Fig. 10: the ablations of configs/ablations that were trained and released, in one table beside their reference."""

import argparse
import sys
from pathlib import Path

from coding.report import Row
from experiments.coded import Coding, Variant, distances_of, evaluator_of, table_of
from experiments.inputs import ROOT, about, named_photographs
from experiments.patch_distances import add_distances
from experiments.summary import CHANGE, HIGH, LOW, draw_bars, mean_of, write_summary
from measuring.intervals import paired
from models.released import ABOUT, load_release
from training.config import RUN_CONFIG
from utils.config import load_mapping
from utils.distributed import is_main, local_device
from utils.errors import DiffoError

ABLATIONS = ROOT / "configs" / "ablations"


def run(args: argparse.Namespace) -> None:
    """pictures.csv by picture, and the table: means, and mean differences from --reference over the same pictures.

    Raises:
        DiffoError: an option is wrong, before anything is coded.
    """
    folders = gathered(args.releases)
    if args.reference not in folders:
        known = ", ".join(folders)
        raise DiffoError(f"--reference {args.reference}: none of the releases is called so; there are {known}")
    releases = {name: load_release(folder, local_device(args.device)) for name, folder in folders.items()}
    evaluator, pictures = evaluator_of(args), named_photographs(args.data, args.limit)
    by_patches = distances_of(args.distances, args.device)
    variants = [Variant(name, f"{args.quality:g}", codec, args.quality) for name, codec in releases.items()]
    variants = [v if v.model.has_levels else Variant(v.codec, "0", v.model) for v in variants]
    with table_of(args, "pictures", releases) as table:
        coding = Coding(table, pictures, args.out_path, evaluator)
        coding.code(variants)
        rows = {v.codec: coding.rows(v.codec, v.label) for v in variants}
    if is_main():
        reference = rows[args.reference]
        means = [
            {"codec": name, "changes": change_of(name)}
            | mean_of(found, evaluator.names)
            | differences(found, reference, evaluator.names)
            for name, found in rows.items()
        ]
        decoded = [[coding.decoded(v.codec, v.label, picture) for picture in pictures] for v in variants]
        place = list(rows).index(args.reference)
        add_distances(means, decoded, list(pictures.values()), by_patches, place)
        title = f"Fig. 10: ablations beside {args.reference}, {args.data.name}"
        told = about(args, releases, sampling=f"one step, each at quality {args.quality:g} if it has that, else 0")
        write_summary(means, args.out_path, "ablation", told, title)
        draw_bars(means, args.out_path, [*args.metrics, *args.distances], ("codec",), title)


def gathered(places: list[Path]) -> dict[str, Path]:
    """Release folders at or directly below these places, by the names of their configurations.

    Runs that have no release yet are named on stderr. Raises DiffoError where there is no release, or two of one name.
    """
    found: dict[str, Path] = {}
    for place in places:
        if not place.is_dir():
            raise DiffoError(f"{place}: no such folder (--releases)")
        for folder in [place, *sorted(path for path in place.iterdir() if path.is_dir())]:
            if not (folder / RUN_CONFIG).is_file():
                continue
            if not (folder / ABOUT).is_file():
                if is_main():
                    print(f"left out: {folder} has no release yet: python -m release {folder} OUT", file=sys.stderr)
                continue
            name = load_mapping(folder / RUN_CONFIG).get("name") or folder.resolve().name
            if (other := found.setdefault(name, folder)) != folder:
                raise DiffoError(f"{other} and {folder} are both releases of {name}; leave out one")
    if not found:
        raise DiffoError(f"{places[0]}: no release there (--releases); python -m release makes one of a run")
    return found


def change_of(name: str) -> str | None:
    """What an ablation changes, as the first line of its configuration says; None for another run.

    `<name>-seed-N` is the ablation called `<name>`, trained from that seed.
    """
    plain, _, seed = name.partition("-seed-")
    path = ABLATIONS / f"{plain}.yaml"
    if not path.is_file():
        return None
    told = path.read_text().splitlines()[0].lstrip("# ")
    return f"{told} Seed {seed}." if seed else told


def differences(rows: list[Row], reference: list[Row], scores: list[str]) -> Row:
    """For every score, the mean of its differences from the reference, with its interval."""
    found: Row = {}
    for name in scores if rows is not reference else ():
        if interval := paired([row.get(name) for row in rows], [row.get(name) for row in reference]):
            key = CHANGE + name
            found |= {key: interval.mean, key + LOW: interval.low, key + HIGH: interval.high}
    return found
