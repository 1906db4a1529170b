"""KID and FID of every row of means: between the patches of all originals and of what they decode to."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from coding.report import Row
from experiments.summary import HIGH, LOW
from measuring.patches import PatchDistances
from utils.images import read_image


def add_distances(
    means: Sequence[Row], decoded: Sequence[list[Path]], originals: list[Path], by: PatchDistances
) -> None:
    """Add the distances, with their intervals, to the means whose pictures are all decoded; says which are refused.

    Args:
        decoded: for each of the means, the decoded pictures in the order of `originals`.
    """
    if not by.names:
        return
    real = [by.features(read_image(path)) for path in originals]
    reasons: dict[str, str] = {}
    for mean, paths in zip(tqdm(means, desc="patches", unit="row"), decoded, strict=True):
        if mean["reached"] < mean["pictures"]:
            continue
        found, refused = by.between(real, [by.features(read_image(path)) for path in paths])
        reasons |= refused
        for name, interval in found.items():
            mean |= {name: interval.mean, name + LOW: interval.low, name + HIGH: interval.high}
    for reason in reasons.values():
        print(f"left out: {reason}", file=sys.stderr)
