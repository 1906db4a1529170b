"""Two releases at equal bytes: one codes a picture by its base alone, the other takes at most as many bytes for it."""

import argparse
from dataclasses import dataclass

from torch import Tensor

from coding import budget
from coding.plan import STREAM
from coding.report import Row
from experiments.baselines import Coded
from experiments.coded import Coding, Variant, at, evaluator_of, table_of
from experiments.inputs import about, named_photographs, releases_of, weights_of
from experiments.summary import draw_bars, mean_of, write_summary
from measuring.scores import SCORES
from models.codec import Codec
from models.released import load_release
from utils.distributed import is_main
from utils.errors import BudgetError, DiffoError

BASE, OURS = "base alone", "two layers"


@dataclass(frozen=True)
class TwoLayers:
    """A release as `Coding.match` wants other codecs: the largest file of a whole picture within a number of bytes."""

    codec: Codec
    name: str = OURS
    label: str = OURS
    suffix: str = STREAM

    def fit(self, image: Tensor, max_bytes: int, payload: bool = False) -> Coded | None:
        """None where the smallest file is larger. payload: the whole file counts either way."""
        try:
            fitted = budget.fit(self.codec, self.codec.analyse(image), max_bytes)
        except BudgetError:
            return None
        return self._coded(fitted.data, f"level {fitted.code} of 255")

    def smallest(self, image: Tensor) -> Coded:
        return self._coded(self.codec.compress(image), "base alone")

    def _coded(self, data: bytes, setting: str) -> Coded:
        return Coded(data, len(data), setting, 1.0, self.codec.decompress(data))


def run(args: argparse.Namespace) -> None:
    """pictures.csv by picture, and the table: both sides for every rival, with how many pictures each won by score.

    Raises:
        DiffoError: an option is wrong, or a rival codes more than its base, before anything is coded.
    """
    releases = releases_of(args)
    (name, ours), *others = releases.items()
    if others:
        raise DiffoError("--weights: one release is compared with those of --against; name one")
    rivals = rivals_of(args, ours)
    evaluator, pictures = evaluator_of(args), named_photographs(args.data, args.limit)
    variants = [Variant(BASE, rival, codec) for rival, codec in rivals.items()]
    with table_of(args, "pictures", releases | rivals) as table:
        coding = Coding(table, pictures, args.out_path, evaluator)
        coding.code(variants)
        coding.match([TwoLayers(ours)], variants, f"{weights_of(ours)}, ")
        means = []
        for rival in rivals:
            sides = coding.rows(BASE, rival), coding.rows(OURS, at(rival))
            won = wins(*sides, evaluator.names), wins(*reversed(sides), evaluator.names)
            means += [mean_of(side, evaluator.names) | better for side, better in zip(sides, won, strict=True)]
    if is_main():
        title = f"{name} within the bytes of base-only releases, {args.data.name}"
        write_summary(means, args.out_path, "equal_bytes", about(args, releases | rivals), title)
        draw_bars(means, args.out_path, args.metrics, ("codec", "label"), title)


def rivals_of(args: argparse.Namespace, ours: Codec) -> dict[str, Codec]:
    """The codecs of --against by name. Raises DiffoError for one with a residual codec, and for two of one name."""
    rivals = {folder.resolve().name: load_release(folder, ours.device) for folder in args.against}
    if len(rivals) < len(args.against):
        raise DiffoError("--against: two releases of one folder name, which their rows would share; rename one")
    for rival, codec in rivals.items():
        if codec.has_levels:
            raise DiffoError(f"--against: {rival} has a residual codec; compare with releases of the base alone")
    return rivals


def wins(side: list[Row], other: list[Row], scores: list[str]) -> Row:
    """For every score that all pictures have: on how many of them a side is better than the other, strictly."""
    found: Row = {}
    for name in scores:
        pairs = [(a.get(name), b.get(name)) for a, b in zip(side, other, strict=True)]
        if not any(None in pair for pair in pairs):
            better = sum(a < b if SCORES[name].lower_is_better else a > b for a, b in pairs)
            found[f"won by {SCORES[name].heading}"] = f"{better} of {len(pairs)}"
    return found
