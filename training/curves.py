"""What a training run has logged, as one picture: every term of its loss, rates by level and validation over the iterations.

python -m training.curves runs/tiny
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.commandline import answer, command_parser
from utils.errors import DiffoError

NOT_DRAWN = ("stage", "step", "revived", "pictures_per_second", "peak_memory_gib")
LEVEL = "bpp_level_"  # begins the rates of the levels, which share a panel


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, "python -m training.curves")
    parser.add_argument("run", type=Path, help="run folder of main_diffusion_train_vq.py")
    parser.add_argument("--stage", metavar="NAME", help="of those that the run has (default: the last)")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="default: curves.png in the run folder")
    return parser.parse_args(argv)


def logged(path: Path) -> list[dict]:
    """The entries of a log; a last line that is not whole, of a run that goes on, is left out. Raises DiffoError."""
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        entries = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError as error:
        raise DiffoError(f"{path}: not a log of a training run ({error})") from error
    if not all(isinstance(entry, dict) and {"stage", "step"} <= entry.keys() for entry in entries):
        raise DiffoError(f"{path}: not a log of a training run (a line without stage and step)")
    return entries


def series(entries: Sequence[dict], stage: str) -> dict[str, tuple[list[int], list[float]]]:
    """Iterations and values of every quantity that a stage has logged, in the order of the log."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for entry in entries:
        for name, value in entry.items():
            if entry["stage"] == stage and name not in NOT_DRAWN:
                steps, values = found.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    return found


def draw(args: argparse.Namespace) -> None:
    from measuring.charts import Curve, panels
    from utils.logging import METRICS, VALIDATION  # which imports torch

    path = args.output or args.run / "curves.png"
    if path.suffix != ".png":
        raise DiffoError(f"-o {path}: name a .png file; a .pdf file is written beside it")
    entries = logged(args.run / METRICS)
    if not entries:
        raise DiffoError(f"{args.run}: no training run there, or none that has logged anything ({METRICS})")
    stage = args.stage or entries[-1]["stage"]
    if not (trained := series(entries, stage)):
        there = ", ".join(dict.fromkeys(entry["stage"] for entry in entries))
        raise DiffoError(f"{args.run}: nothing logged of stage {stage}; there are: {there}")
    drawn: dict[str, list[Curve]] = {}
    for name, (steps, values) in trained.items():
        panel, label = ("bits per pixel by level", name.removeprefix(LEVEL)) if name.startswith(LEVEL) else (name, "")
        drawn.setdefault(panel, []).append(Curve(label, steps, values))
    for name, (steps, values) in series(logged(args.run / VALIDATION), stage).items():
        drawn[f"validation: {name}"] = [Curve("", steps, values)]
    panels(drawn, path, "iterations", f"stage {stage}")
    print(path)


def main(argv: Sequence[str] | None = None) -> int:
    return answer(draw, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
