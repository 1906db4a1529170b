"""Reproduce the paper's measurements.

python reproduce.py weights        fetch the weights of LPIPS and DISTS (and of the LPIPS loss) once, online
"""

import argparse
import sys

from utils.commandline import answer
from utils.metrics import download_weights


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["weights"])
    parser.add_argument("--timeout", type=float, default=20, metavar="S", help="seconds for a connection (default 20)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return answer(download_weights, args.timeout)


if __name__ == "__main__":
    sys.exit(main())
