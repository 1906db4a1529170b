"""KID and FID of every row of means: between the patches of all originals and of what they decode to."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from coding.report import Row
from experiments.summary import CHANGE, HIGH, LOW
from measuring.patches import Features, PatchDistances
from utils.images import read_image


def add_distances(
    means: Sequence[Row],
    decoded: Sequence[list[Path]],
    originals: list[Path],
    by: PatchDistances,
    reference: int | None = None,
) -> None:
    """Add the distances, with their intervals, to the means whose pictures are all decoded; says which are refused.

    Args:
        decoded: for each of the means, the decoded pictures in the order of `originals`.
        reference: position of the row that the changes of the others are from, where they are wanted.
    """
    if not by.names:
        return
    real, of = _features(originals, by), None if reference is None else _features(decoded[reference], by)
    reasons: dict[str, str] = {}
    for i, (mean, paths) in enumerate(zip(tqdm(means, desc="patches", unit="row"), decoded, strict=True)):
        if mean["reached"] < mean["pictures"]:
            continue
        fake = of if i == reference else _features(paths, by)
        found, refused = by.between(real, fake)
        reasons |= refused
        if reference is not None and i != reference:
            found |= {CHANGE + name: interval for name, interval in by.changes(real, fake, of).items()}
        for name, interval in found.items():
            mean |= {name: interval.mean, name + LOW: interval.low, name + HIGH: interval.high}
    for reason in reasons.values():
        print(f"left out: {reason}", file=sys.stderr)


def _features(pictures: Sequence[Path], by: PatchDistances) -> list[Features]:
    return [by.features(read_image(path)) for path in pictures]
