"""Training speed and memory with options of the block `speed`: pictures per second and peak memory of whole steps.

    python -m benchmarks.train --config configs/tiny.yaml
    python -m benchmarks.train codec.batch_size=1 --stages codec --options plain bfloat16

A step is forward, losses, backward, update and averages, on batches that are there already; loading is not measured.
Every option trains in a process of its own, one after the other. The median of the rounds is printed, and its ratio to
the first option's. Peak memory is the process's (resident on the CPU, allocated tensors on CUDA).
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import replace
from itertools import cycle, islice

import torch

from datapipe.pictures import Pictures, stream
from training.config import TrainConfig, load_config
from training.progress import Progress
from training.speed import Speed, SpeedParams
from training.stages import STAGES
from training.start import new_codec, start_from
from training.step import Step
from utils import distributed
from utils.commandline import answer, command_parser, positive

PLAIN = SpeedParams("float32", channels_last=False, fused_adamw=False, keep_memory=False)
OPTIONS = {
    "plain": PLAIN,
    "channels_last": replace(PLAIN, channels_last=True),
    "fused_adamw": replace(PLAIN, fused_adamw=True),
    "keep_memory": replace(PLAIN, keep_memory=True),
    "checkpointing": replace(PLAIN, checkpointing=True),
    "compile": replace(PLAIN, compile=True),
    "tf32": replace(PLAIN, tf32=True),
    "bfloat16": replace(PLAIN, precision="bfloat16"),
    "defaults": SpeedParams(),
    "defaults+compile": SpeedParams(compile=True),
}
OWN = "config"  # the configuration's own block, overrides included
BATCHES = 8  # different ones, again and again


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--config", default="configs/tiny.yaml", metavar="YAML")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="default: the configuration's")
    parser.add_argument("--options", nargs="+", choices=[*OPTIONS, OWN], default=["plain", OWN])
    parser.add_argument("--steps", type=positive, default=4, metavar="N", help="steps of a round (default: 4)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="rounds of each (default: 5)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(argv)


def measured(config: TrainConfig, name: str, device: torch.device, steps: int, rounds: int) -> tuple[float, float]:
    """Pictures per second, the median of the rounds, and peak memory in MiB."""
    Speed(config.speed, device).settle()
    params = getattr(config, name)
    codec = new_codec(config).to(device)
    start_from(config, codec)
    step, progress = Step(STAGES[name](config, codec, device)), Progress(params)
    draws = step.stage.draw_params(params.crop_size, params.crop_size)
    pictures = Pictures(replace(config.data, workers=0), params.crop_size, config.seed, draws=draws)
    batches = cycle(list(islice(stream(pictures, params.batch_size, 0, 1, 0), BATCHES)))
    times = []
    for _ in range(1 + rounds):  # the first warms up
        began = time.perf_counter()
        for _ in range(steps):
            step(next(batches).to(device), progress)  # waits for its flags
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return steps * params.batch_size / statistics.median(times[1:]), peak


def bench(args: argparse.Namespace) -> None:
    device = distributed.local_device(args.device)
    config = load_config(args.config, args.overrides)
    print(f"{args.config}, {device}, {torch.get_num_threads()} threads")
    for stage in args.stages or config.stages:
        print(f"{'stage ' + stage:18}{'pictures/s':>12}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}", flush=True)
        first = None
        for name in args.options:
            chosen = config if name == OWN else replace(config, speed=OPTIONS[name])
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rate, peak = pool.apply(measured, (chosen, stage, device, args.steps, args.rounds))
            first = first or (rate, peak)
            print(f"{name:18}{rate:12.2f}{rate / first[0]:8.2f}{peak:10.0f}{peak / first[1]:8.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(answer(bench, parse()))
