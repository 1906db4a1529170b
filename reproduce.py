"""Reproduce the paper's measurements.

python reproduce.py weights                                      fetch the weights of learned scores once, online
python reproduce.py eta --data VAL --held_out PICTURES -o OUT    sweep and fit the noise level of the one step (Fig. 5)
python reproduce.py rates --data kodak -o OUT                    code the pictures at several qualities: table and curves
python reproduce.py equal_bytes --against DIR --data kodak -o OUT    two layers against a base-only release, at its bytes
"""

import argparse
import sys
from pathlib import Path

from utils.commandline import answer, command_parser, loading, positive

QUALITIES = ("0", "0.4", "20", "40", "60", "80", "100")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="experiment", required=True)
    weights = commands.add_parser("weights", help="fetch the weights of learned scores")
    weights.add_argument("--timeout", type=float, default=20, metavar="S", help="for a connection (default 20 seconds)")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--weights", type=Path, metavar="DIR", help="release folder (default: the small one that ships)"
    )
    common.add_argument("--data", type=Path, required=True, metavar="DIR", help="pictures, for instance Kodak")
    common.add_argument("-o", "--out_path", type=Path, required=True, metavar="DIR", help="for tables and charts")
    common.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")

    eta = commands.add_parser(
        "eta", parents=[common], help="sweep the noise level at several rates, fit c of eta = c / B"
    )
    eta.add_argument("--held_out", type=Path, required=True, metavar="DIR", help="photographs to compare on")
    eta.add_argument("--limit", type=positive, metavar="N", help="at most so many photographs of each folder")
    eta.add_argument("--points", type=positive, default=12, metavar="N", help="noise levels in the sweep (default 12)")
    eta.add_argument("--metric", default="lpips-vgg", metavar="NAME", help="to fit by (default %(default)s)")
    eta.add_argument("--store", type=Path, metavar="DIR", help="write a release with the fitted c, in a new folder")
    rates = commands.add_parser("rates", parents=[common], help="code pictures at several qualities of one model")
    rates.add_argument("--qualities", nargs="+", default=QUALITIES, metavar="Q", help="default: " + " ".join(QUALITIES))
    rates.add_argument("--metrics", nargs="+", default=["fsim", "nlpd"], metavar="NAME", help="default: fsim nlpd")
    equal = commands.add_parser(
        "equal_bytes", parents=[common], help="compare with base-only releases, each picture at their bytes"
    )
    equal.add_argument("--against", type=Path, nargs="+", required=True, metavar="DIR", help="base-only releases")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if args.experiment == "weights":
        from measuring.weights import download_weights

        return download_weights(args.timeout)
    with loading():
        from experiments import equal_bytes, eta, rates  # torch takes seconds: wrong usage is answered before
    {"eta": eta, "rates": rates, "equal_bytes": equal_bytes}[args.experiment].run(args)


def main(argv: list[str] | None = None) -> int:
    return answer(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
