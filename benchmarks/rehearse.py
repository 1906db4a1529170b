"""The paper's size from pictures to a coded picture in minutes: whether it works here, and how long all of it would take.

python -m benchmarks.rehearse
python -m benchmarks.rehearse --data pictures/ --iterations 500

Trains `configs/config.yaml` with fewer iterations, with the commands that a user gives, each in a process of its own: the
settings are checked, stage gt is trained, stage codec halfway, the run is resumed, a release is made of it, a photograph
is coded and decoded. On CUDA all else is as configured. On a CPU a step takes one crop, and the release has one table of
indices from few crops. Perceptual terms whose weights are not here are replaced, and the report says by what.
Exit status 1 where a loss has not fallen, from 100 iterations on.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

from coding.report import Row
from datapipe.sources import demo_photographs
from experiments.inputs import about
from experiments.summary import write_summary
from measuring.weights import VGG16
from training.config import TrainConfig, load_config
from utils.commandline import answer, command_line, command_parser, number
from utils.distributed import local_device
from utils.errors import DiffoError
from utils.files import make_folder
from utils.logging import METRICS

LOG = "commands.log"  # what the commands said; a folder that has it is a rehearsal's
RUN, RELEASE, CODED = "run", "release", "coded"
ITERATIONS = {"cuda": 200, "cpu": 10}
ENOUGH = 100  # iterations after which a loss must have fallen
ON_CPU = ("gt.batch_size=1", "gt.statistics=8", "codec.batch_size=1")
PICTURE = "chelsea.png"  # the smallest photograph of the demo: at the paper's size D takes 6 MFLOP a pixel
COUNTED = {"cuda": ("--crops", "256", "--index_steps", "200"), "cpu": ("--crops", "16", "--index_steps", "0")}
GIB = 2**30


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__, "python -m benchmarks.rehearse")
    add = parser.add_argument
    add("--config", default="configs/config.yaml", metavar="YAML")
    add("--data", metavar="PATH", help="pictures, as for training (default: demo photographs)")
    several = number(int, lambda value: value >= 4, "from 4 up: a speed takes two")
    add("--iterations", type=several, metavar="N", help="of each stage (default: 200 on CUDA, 10 on a CPU)")
    add("-o", "--out", type=Path, default=Path("results/rehearsal"), metavar="DIR", help="default: results/rehearsal")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    add("overrides", nargs="*", metavar="key=value", help="for instance 'stages=[codec]' autoencoder=FILE")
    args = parser.parse_intermixed_args(argv)
    args.command = command_line("-m benchmarks.rehearse", argv)
    return args


def rehearse(args: argparse.Namespace) -> int:
    kind = local_device(args.device).type
    config = load_config(args.config, args.overrides)
    iterations = args.iterations or ITERATIONS[kind]
    emptied(args.out)
    other = [*without_lpips(config), *(ON_CPU if kind == "cpu" else ())]
    rows = []
    for name, command in commands(args, config, iterations, other, COUNTED[kind]):
        rows.append(done(name, command, args.out))
    print()
    told = full(config, rows) | {"other than configured": " ".join(other) or "nothing"}
    told |= {"size of this folder, GiB": round(size(args.out) / GIB, 2)}
    made = about(args, {}) | {f"command {n}": shlex.join(row.pop("command")) for n, row in enumerate(rows, 1)}
    title = f"A rehearsal of {args.config}, {iterations} iterations a stage"
    write_summary(rows, args.out, "rehearsal", told | made, title)
    print(*(f"{key}: {value}" for key, value in told.items()), sep="\n")
    risen = [name for name, (first, last) in losses(rows).items() if last >= first] if iterations >= ENOUGH else []
    for name in risen:
        print(f"error: the loss of stage {name} has not fallen", file=sys.stderr)
    return 1 if risen else 0


def emptied(out: Path) -> None:
    """An earlier rehearsal's folder without what it made. Raises DiffoError for a folder with anything else in it."""
    if out.exists() and not (out / LOG).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise DiffoError(f"{out}: neither an empty folder nor a rehearsal's; choose another -o")
    make_folder(out)
    for name in (RUN, RELEASE, CODED):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / LOG).write_bytes(b"")


def without_lpips(config: TrainConfig) -> list[str]:
    """Overrides that put MS-SSIM, with its factor, in the place of LPIPS, where that has no weights here."""
    found = {stage: getattr(config, stage).perceptual.get("lpips") for stage in config.stages}
    if VGG16.path.is_file() or not any(found.values()):
        return []
    print(
        f"LPIPS' weights {VGG16.path} are not here (python reproduce.py weights): MS-SSIM stands for it, and is faster"
    )
    factors = {f"{stage}.perceptual": factor for stage, factor in found.items() if factor}
    return [override for key, factor in factors.items() for override in (f"{key}.lpips=0", f"{key}.ms_ssim={factor}")]


def commands(
    args: argparse.Namespace, config: TrainConfig, iterations: int, other: list[str], counted: tuple[str, ...]
) -> Iterator[tuple[str, list[str]]]:
    """Names of the steps and what Python is called with; those of training are named after their stage."""
    run, device = str(args.out / RUN), ["--device", args.device]
    train = ["main_diffusion_train_vq.py", *device]
    short = [f"name={RUN}", f"gt.iterations={iterations}", "gt.minutes=null", "codec.minutes=null"]
    short += [f"log_every={max(1, iterations // 20)}", "keep_last=1"]
    data = ["--data", args.data] if args.data else []
    begin = [*train, "--cfg_path", args.config, "--save_dir", str(args.out), *data, *args.overrides, *other, *short]
    yield "settings, pictures, memory", [*begin, f"codec.iterations={iterations}", "--dry_run"]
    if "gt" in config.stages:
        yield "gt", [*begin, "stages=[gt]"]
        begin = [*train, "--resume", run, "stages=[gt,codec]"]
    yield "codec", [*begin, f"codec.iterations={iterations // 2}"]
    yield "codec, resumed", [*train, "--resume", run, f"codec.iterations={iterations}"]
    yield "release", ["-m", "release", run, str(args.out / RELEASE), *counted, *device]
    coded = [
        "-i",
        str(next(path for path in demo_photographs() if path.name == PICTURE)),
        "-o",
        str(args.out / CODED),
        "--weights",
        str(args.out / RELEASE),
    ]
    yield "one picture coded", ["inference.py", *coded, *device]


def done(name: str, command: list[str], out: Path) -> Row:
    """The row of a step, which is run, and told in one line. Raises DiffoError where it fails."""
    print(f"{name:<28}", end="", flush=True)
    log, metrics, began = out / LOG, out / RUN / METRICS, time.perf_counter()
    start, before = log.stat().st_size, len(logged(metrics))
    status, peak = call(command, log)
    seconds = time.perf_counter() - began
    if status:
        print("failed")
        said = log.read_bytes()[start:].decode(errors="replace").replace("\r", "\n").strip().splitlines()
        raise DiffoError(f"{name}: exit status {status}: {said[-1] if said else 'nothing said'} (all of it: {log})")
    row = {"step": name, "seconds": seconds, "peak memory, GiB": peak, **trained(logged(metrics)[before:])}
    print("  ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)))
    return row | {"command": ["python", *command]}


def call(command: list[str], log: Path) -> tuple[int, float]:
    """Exit status and peak memory, in GiB, of Python with these arguments; what it says is added to a file."""
    with log.open("ab") as said:
        said.write(f"\n$ {shlex.join(['python', *command])}\n".encode())
        said.flush()
        with subprocess.Popen([sys.executable, *command], stdout=said, stderr=said) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def logged(metrics: Path) -> list[dict]:
    """What a run has logged so far."""
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []


def trained(lines: list[dict]) -> Row:
    """Speed, memory and losses (of the first and the last quarter, means) of what one command has logged; {} of nothing."""
    if not lines:
        return {}
    found, quarter = [line["loss"] for line in lines], max(1, len(lines) // 4)
    speeds = [line["pictures_per_second"] for line in lines if "pictures_per_second" in line]
    memory = [line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line]
    return {
        "peak on the GPU, GiB": max(memory, default=None),
        "pictures/s": median(speeds) if speeds else None,
        "first loss": fmean(found[:quarter]),
        "last loss": fmean(found[-quarter:]),
    }


def losses(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """First and last loss by stage."""
    ends: dict[str, tuple[float, float]] = {}
    for row in rows:
        if "last loss" in row:
            stage = row["step"].partition(",")[0]
            ends[stage] = ends.get(stage, (row["first loss"],))[0], row["last loss"]
    return ends


def full(config: TrainConfig, rows: list[Row]) -> dict[str, str]:
    """What every stage of the whole configuration would take at the speed that the rehearsal had last."""
    speeds = {row["step"].partition(",")[0]: row["pictures/s"] for row in rows if row.get("pictures/s")}
    told = {}
    for stage, speed in speeds.items():
        params = getattr(config, stage)
        crops = params.iterations * params.batch_size
        hours = params.minutes / 60 if params.minutes else crops / speed / 3600
        words = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
        words += f", {speed:.3g} pictures a second" + ("" if params.minutes else f" of {crops:,}")
        if params.adversary.weight and params.adversary.start:
            words += f"; longer with its adversary, from iteration {params.adversary.start:,} on"
        told[f"the whole of stage {stage}"] = words
    return told


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(argv: list[str] | None = None) -> int:
    return answer(rehearse, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
