"""Rate-aware noise modulation, fitted: eta is swept at several rates, and c of eta = clip(c / B) follows (Fig. 5).

The metric decides what c means. A fidelity metric punishes every invented detail, so it may prefer the least noise at
every rate; c is then not identifiable, and the default stays.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from coding.report import Row
from coding.table import Table
from experiments.coded import fill, table_of
from experiments.inputs import about, checksum, photographs, weights_of
from experiments.summary import write_summary
from measuring.charts import Curve, chart
from measuring.evaluator import Evaluator
from measuring.scores import SCORES, unavailable
from models.codec import Codec
from models.diffusion import RateParams
from models.records import Sampling
from models.released import ABOUT, SMALL, load_release
from release.making import require_empty, with_rate
from training.config import RUN_CONFIG
from utils.distributed import is_main, local_device
from utils.errors import DiffoError, PictureError
from utils.images import read_image

KEY = ("pictures", "picture", "code")
CODES = (0, 1, 64, 128, 192, 255)
FINEST_C = 400  # values of c that are tried, geometric over the sweep's range


def run(args: argparse.Namespace) -> None:
    """Sweep --data, fit c on it, compare on --held_out: eta, its chart and, with --store, a release with this c.

    Raises:
        DiffoError: an option is wrong, before anything is decoded.
    """
    source = args.weights or SMALL
    if args.store:
        require_empty(args.store)
        for path in (source / ABOUT, source / RUN_CONFIG):
            if not path.is_file():
                raise DiffoError(f"{path}: not there; --store copies it into the new release")
    pictures = {"fit": photographs(args.data, args.limit), "held_out": photographs(args.held_out, args.limit)}
    metric = args.metric
    if reason := unavailable(metric):
        raise DiffoError(f"--metric {metric}: {reason}, or name one that needs no weights, such as nlpd")
    codec = load_release(source, local_device(args.device))
    default = codec.params.rate
    codes = [code for code in CODES if code == 0 or codec.has_levels]
    etas = np.geomspace(codec.rate.eta_min, codec.rate.eta_max, args.points)
    releases = {source.resolve().name: codec}
    with table_of(args, "pictures", releases, KEY) as table:
        sweeps = {name: sweep(table, codec, name, paths, codes, etas, metric) for name, paths in pictures.items()}
    if not is_main():
        return
    rate, found = fit(sweeps["fit"], default), sweeps["fit"]
    better = "lower" if SCORES[metric].lower_is_better else "higher"
    told = about(args, releases, metric=metric, better=better, identifiable=found.identifies_c, c=round(rate.c, 5))
    rows = [
        {"set": name.replace("_", " "), "pictures": len(pictures[name])} | each.told(rate, default)
        for name, each in sweeps.items()
    ]
    points = {name: {"etas": s.etas, "rates": s.rates, "scores": s.sign * s.costs} for name, s in sweeps.items()}
    points = {name: {key: values.tolist() for key, values in each.items()} for name, each in points.items()}
    score = f"{SCORES[metric].heading} ({better} is better)"
    title = f"Fig. 5: {score} by noise level, c = {rate.c:.4g}"
    write_summary(rows, args.out_path, "eta", told, title, sweeps=points)
    curves = [
        Curve(rate_label(b), found.etas, found.sign * row, rate.eta(b))
        for b, row in zip(found.rates, found.costs, strict=True)
    ]
    title = f"Noise level of the one step, by rate (diamonds: c = {rate.c:.4g})"
    chart(curves, args.out_path / "eta.png", "noise level eta", score, title, log_x=True)
    if args.store:
        with_rate(source, rate, args.store)
        print(f"wrote {args.store}, with c = {rate.c:.4g}")


def rate_label(rate: float) -> str:
    """What a curve's rate is: B_eta of Eq. 11, which sets its noise level, is not that of whole files."""
    return f"{rate:.3f} bpp of coded sections"


@dataclass(frozen=True)
class Sweep:
    """Mean scores of one set of pictures.

    Attributes:
        etas: swept noise levels, rising, (E,). rates: mean B_eta at every code, bits per pixel, (R,).
        costs: mean over the pictures, (R, E), less is better. sign: -1 where the score is their negative, else 1.
    """

    etas: np.ndarray
    rates: np.ndarray
    costs: np.ndarray
    sign: int = 1

    def of_rule(self, rate: RateParams) -> float:
        """Mean cost over the rates of eta = clip(c / B), interpolated in log eta."""
        etas, swept = np.log([rate.eta(b) for b in self.rates]), np.log(self.etas)
        return float(np.mean([np.interp(eta, swept, row) for eta, row in zip(etas, self.costs, strict=True)]))

    @property
    def identifies_c(self) -> bool:
        """Whether most rates have their best eta inside the sweep rather than at its ends."""
        best = self.costs.argmin(1)
        return bool(((best > 0) & (best < len(self.etas) - 1)).mean() > 0.5)

    def told(self, rate: RateParams, default: RateParams) -> dict[str, float]:
        """Scores of the fitted rule, the default's and the best constant eta."""
        constants = self.costs.mean(0)
        return {
            "fitted rule": round(self.sign * self.of_rule(rate), 5),
            f"rule with c = {default.c}": round(self.sign * self.of_rule(default), 5),
            "best constant eta": round(float(self.etas[constants.argmin()]), 4),
            "its score": round(self.sign * float(constants.min()), 5),
        }


def sweep(
    table: Table, codec: Codec, name: str, pictures: Sequence[Path], codes: Sequence[int], etas: np.ndarray, metric: str
) -> Sweep:
    """Decode every picture at every code with every eta, and score it; what the table has is not done again.

    Args:
        name: of this set of pictures in the table. codes: codes as in the file, 0 for the base alone.
        metric: a key of `measuring.scores.SCORES`.
    Raises:
        PictureError: one is too small for the metric.
    """
    evaluator = Evaluator([metric], codec.device)
    made_from = {path: f"{weights_of(codec)}, {metric}, picture {checksum(path)}" for path in pictures}
    columns = [f"eta {eta:.6g}" for eta in etas]

    def stands(path: Path, code: int) -> bool:
        row = table.get(name, str(path), code) or {}
        return row.get("made_from") == made_from[path] and all(column in row for column in columns)

    def rows_of(path: Path) -> list[Row]:
        image = read_image(path)
        if min(image.shape[1:]) < SCORES[metric].min_side:
            raise PictureError(f"{path}: {metric} needs sides from {SCORES[metric].min_side} pixels")
        analysed, rows = codec.analyse(image), []
        for code in codes:
            contents = codec.read(codec.write(analysed, code))
            row: Row = dict(zip(KEY, (name, str(path), code), strict=True)) | {"made_from": made_from[path]}
            row["section_bpp"] = contents.file.section_bpp
            for column, eta in zip(columns, etas, strict=True):
                row[column] = evaluator(image, codec.render(contents, Sampling(eta=eta)).image)[metric]
            rows.append(row)
        return rows

    todo = [path for path in pictures if not all(stands(path, code) for code in codes)]
    fill(table, [partial(rows_of, path) for path in todo], f"sweeping eta, {name}")
    rows = [[table.get(name, str(path), code) for path in pictures] for code in codes]
    sign = 1 if SCORES[metric].lower_is_better else -1
    rates = np.array([np.mean([row["section_bpp"] for row in each]) for each in rows])
    costs = np.array([[np.mean([row[column] for row in each]) for column in columns] for each in rows])
    return Sweep(etas, rates, sign * costs, sign)


def fit(found: Sweep, default: RateParams) -> RateParams:
    """The c with the least mean cost over the rates; the default where the sweep does not identify one."""
    if not found.identifies_c:
        return default
    low, high = found.etas[0] * found.rates.min(), found.etas[-1] * found.rates.max()
    tried = [RateParams(float(c), default.eta_min, default.eta_max) for c in np.geomspace(low, high, FINEST_C)]
    return min(tried, key=found.of_rule)
