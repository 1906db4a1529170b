"""Reproduce the paper's measurements.

python reproduce.py weights                                      fetch the weights of LPIPS and DISTS once, online
python reproduce.py eta --data VAL --held_out PICTURES -o OUT    sweep and fit the noise level of the one step (Fig. 5)
python reproduce.py rates --data kodak -o OUT                    code the pictures at several qualities: table and curves
python reproduce.py equal_bytes --against DIR --data kodak -o OUT    two layers against a base-only release, at its bytes
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from utils.commandline import answer, positive
from utils.errors import DiffoError

QUALITIES = ("0", "0.4", "20", "40", "60", "80", "100")
LEVELS = (0, 1, 64, 128, 192, 255)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    weights = what.add_parser("weights", help="fetch the weights of perceptual metrics")
    weights.add_argument("--timeout", type=float, default=20, metavar="S", help="for a connection (default 20 seconds)")
    weights.set_defaults(work=fetch_weights)
    eta = what.add_parser("eta", help="sweep the noise level at several rates and fit c of eta = c / B")
    eta.add_argument("--weights", type=Path, metavar="DIR", help="release folder (default: the small one that ships)")
    eta.add_argument("--data", type=Path, required=True, metavar="DIR", help="photographs to fit on")
    eta.add_argument("--held_out", type=Path, required=True, metavar="DIR", help="photographs to compare on")
    eta.add_argument("-o", "--out_path", type=Path, required=True, metavar="DIR", help="for eta.json and eta.png")
    eta.add_argument("--limit", type=positive, metavar="N", help="at most so many photographs of each folder")
    eta.add_argument("--points", type=positive, default=12, metavar="N", help="noise levels in the sweep (default 12)")
    eta.add_argument("--metric", metavar="NAME", help="default: lpips-vgg, or nlpd where its weights are not here")
    eta.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    eta.add_argument("--store", type=Path, metavar="DIR", help="write a release with the fitted c, in a new folder")
    eta.set_defaults(work=fit_eta)
    rates = what.add_parser("rates", help="code pictures at several qualities of one model")
    rates.add_argument("--weights", type=Path, metavar="DIR", help="release folder (default: the small one that ships)")
    rates.add_argument("--data", type=Path, required=True, metavar="DIR", help="pictures, for instance Kodak")
    rates.add_argument("-o", "--out_path", type=Path, required=True, metavar="DIR", help="for files, tables and curves")
    rates.add_argument("--qualities", nargs="+", default=QUALITIES, metavar="Q", help="default: " + " ".join(QUALITIES))
    rates.add_argument("--metrics", nargs="+", default=["fsim", "nlpd"], metavar="NAME", help="default: fsim nlpd")
    rates.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    rates.set_defaults(work=measure_rates)
    equal = what.add_parser("equal_bytes", help="compare with base-only releases, each picture at their bytes")
    equal.add_argument("--weights", type=Path, metavar="DIR", help="release folder (default: the small one that ships)")
    equal.add_argument("--against", type=Path, nargs="+", required=True, metavar="DIR", help="base-only releases")
    equal.add_argument("--data", type=Path, required=True, metavar="DIR", help="pictures, for instance Kodak")
    equal.add_argument("-o", "--out_path", type=Path, required=True, metavar="DIR", help="for equal_bytes.csv")
    equal.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    equal.set_defaults(work=compare_at_equal_bytes)
    return parser.parse_args(argv)


def fetch_weights(args: argparse.Namespace) -> None:
    from measuring.metrics import download_weights

    download_weights(args.timeout)


def fit_eta(args: argparse.Namespace) -> None:
    from experiments import eta as fitting
    from measuring.metrics import METRICS, unavailable
    from models.released import SMALL, load_codec
    from release.making import require_empty, with_rate
    from utils.distributed import local_device
    from utils.files import atomic_write, make_folder, require_writable

    if args.store:
        require_empty(args.store)
    metric, reason = (args.metric, None) if args.metric else fitting.default_metric()
    if metric not in METRICS or (reason is None and unavailable(metric)):
        raise DiffoError(f"--metric {metric}: " + (unavailable(metric) if metric in METRICS else "unknown"))
    if reason:
        print(f"{metric} instead of {fitting.PERCEPTUAL}: {reason}", file=sys.stderr)
    require_writable(make_folder(args.out_path))
    weights = args.weights or SMALL
    codec = load_codec(weights, local_device(args.device))
    levels = [level for level in LEVELS if level == 0 or codec.has_levels]
    etas = np.geomspace(codec.rate.eta_min, codec.rate.eta_max, args.points)
    sets = {}
    for name, folder in {"fit": args.data, "held_out": args.held_out}.items():
        pictures = photographs(folder, args.limit)
        sets[name] = (len(pictures), fitting.sweep(codec, pictures, levels, etas, metric))
    rate = fitting.fit(sets["fit"][1], codec.params.rate)
    about = summary(sets, rate, codec.params.rate, metric, levels) | {"weights": codec.fingerprint.hex()}
    atomic_write(args.out_path / "eta.json", (json.dumps(about, indent=1) + "\n").encode())
    draw(sets["fit"][1], rate, metric, args.out_path / "eta.png")
    print(json.dumps({key: value for key, value in about.items() if key != "sweeps"}, indent=1))
    if args.store:
        with_rate(weights, rate, args.store)
        print(f"wrote {args.store}, with c = {rate.c:.4g}")


def measure_rates(args: argparse.Namespace) -> None:
    """One run of inference.py per quality; then the means in rates.csv and one chart per metric."""
    import inference
    from coding.report import COLUMNS, TABLES, aligned_table, write_rows
    from measuring.charts import Curve, chart

    rows = []
    for quality in args.qualities:
        folder = args.out_path / f"quality_{quality}"
        options = ["-i", args.data, "-o", folder, "--quality", quality, "--one_step", "--ddim", "--overwrite"]
        options += ["--device", args.device, "--metrics", *args.metrics]
        options += ["--weights", args.weights] if args.weights else []
        status = inference.run(inference.parse([str(option) for option in options]))
        if status:
            raise DiffoError(f"--quality {quality}: not every picture could be coded; the errors are above")
        rows.append({"quality": quality} | json.loads((folder / TABLES[1]).read_text())["mean"])
        rows[-1].pop("picture")
    write_rows(rows, args.out_path / "rates.csv")
    for metric in ("psnr", "ms_ssim", *args.metrics):
        points = [(row["bpp"], row[metric]) for row in rows if row.get(metric) is not None]
        if points:
            x, y = zip(*points, strict=True)
            name = COLUMNS.get(metric, (metric,))[0]
            title = f"{name} by rate: one model, mean over {args.data.name}"
            chart([Curve(name, x, y)], args.out_path / f"{metric}.png", "bits per pixel (files)", name, title)
    print(aligned_table(rows))


def compare_at_equal_bytes(args: argparse.Namespace) -> None:
    """Every picture by each rival's base code, then by the two layers within as many bytes: rows and their means."""
    from coding.report import aligned_table, write_rows
    from experiments.equal_bytes import contest
    from models.released import SMALL, load_codec
    from utils.distributed import local_device
    from utils.files import make_folder, require_writable

    require_writable(make_folder(args.out_path))
    pictures, device = photographs(args.data, None), local_device(args.device)
    ours = load_codec(args.weights or SMALL, device)
    rows, means = [], []
    for folder in args.against:
        found = contest(ours, load_codec(folder, device), folder.name, pictures)
        rows += [row for pair in zip(found.theirs, found.ours, strict=True) for row in pair]
        means += found.means()
    write_rows(rows, args.out_path / "equal_bytes.csv")
    print(aligned_table(means))


def photographs(folder: Path, limit: int | None) -> list[Path]:
    """At most `limit` pictures of the folder, spread evenly over its sorted names."""
    from utils.images import find_pictures

    found = find_pictures(folder, recursive=True)
    if not found:
        raise DiffoError(f"{folder}: no pictures there")
    step = max(1, len(found) // (limit or len(found)))
    return found[::step][:limit]


def summary(sets: dict, rate, default, metric: str, levels: list[int]) -> dict:
    """What eta.json says: the fit, and the rule against every constant eta on both sets."""
    from experiments.eta import LOWER_IS_BETTER

    sign = 1 if metric in LOWER_IS_BETTER else -1
    about = {
        "metric": metric,
        "better": "lower" if sign == 1 else "higher",
        "identifiable": sets["fit"][1].identifies_c,
        "c": round(rate.c, 5),
        "levels": levels,
        "sweeps": {},
    }
    for name, (count, found) in sets.items():
        constants = sign * found.of_constants()
        best = int((sign * constants).argmin())
        about[name] = {
            "pictures": count,
            "fitted rule": round(sign * found.of_rule(rate), 5),
            f"rule with c = {default.c}": round(sign * found.of_rule(default), 5),
            "best constant eta": round(float(found.etas[best]), 4),
            "its score": round(float(constants[best]), 5),
        }
        about["sweeps"][name] = {
            "etas": found.etas.tolist(),
            "rates": found.rates.tolist(),
            "scores": (sign * found.scores).tolist(),
        }
    return about


def draw(found, rate, metric: str, path: Path) -> None:
    from experiments.eta import LOWER_IS_BETTER
    from measuring.charts import Curve, chart

    sign = 1 if metric in LOWER_IS_BETTER else -1
    curves = [
        Curve(f"{b:.3f} bpp", found.etas, sign * row, rate.eta(b))
        for b, row in zip(found.rates, found.scores, strict=True)
    ]
    better = "lower" if sign == 1 else "higher"
    title = f"Noise level of the one step, by rate (diamonds: c = {rate.c:.4g})"
    chart(curves, path, "noise level eta", f"{metric} ({better} is better)", title, log_x=True)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return answer(args.work, args)


if __name__ == "__main__":
    sys.exit(main())
