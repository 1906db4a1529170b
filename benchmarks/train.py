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
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice

import torch

from datapipe.pictures import Batch, Pictures, stream
from experiments.stopwatch import seconds
from training.config import TrainConfig, load_config
from training.perceptual import perceptual_terms
from training.progress import Progress
from training.speed import Speed, SpeedParams
from training.stages import STAGES
from training.start import new_codec, start_from
from training.step import Step
from utils import distributed
from utils.commandline import answer, command_parser, positive

PLAIN = SpeedParams("float32", perceptual_tf32=False, channels_last=False, fused_adamw=False, keep_memory=False)
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
    "without graphs": SpeedParams(graphs=False),
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


def prepared(
    config: TrainConfig, name: str, device: torch.device, untrained: bool = False
) -> tuple[Step, Iterator[Batch]]:
    """A stage ready for its first step, and batches on the device without end.

    Args:
        untrained: random weights for LPIPS, whose own need not be on the disk then: it takes as long.
    """
    Speed(config.speed, device).settle()
    params = getattr(config, name)
    lpips = {"lpips": params.perceptual["lpips"]} if untrained and params.perceptual.get("lpips") else {}
    if lpips:
        config = replace(config, **{name: replace(params, perceptual=dict(params.perceptual) | {"lpips": 0.0})})
    codec = new_codec(config).to(device)
    start_from(config, codec)
    stage = STAGES[name](config, codec, device)
    if lpips:
        terms = perceptual_terms(lpips, untrained=True, tf32=stage.speed.perceptual_tf32).to(device)
        stage.speed.prepare(terms)
        stage.perceptual.update(terms)
        stage.factors = stage.factors | lpips
    draws = stage.draw_params(params.crop_size, params.crop_size)
    pictures = Pictures(replace(config.data, workers=0), params.crop_size, config.seed, draws=draws)
    batches = islice(stream(pictures, params.batch_size, 0, 1, 0), BATCHES)
    return Step(stage), cycle([batch.to(device) for batch in batches])


def measured(
    config: TrainConfig, name: str, device: torch.device, steps: int, rounds: int, untrained: bool = False
) -> tuple[float, float]:
    """Pictures per second, the median of the rounds, and peak memory in MiB. `untrained`: see `prepared`."""
    step, batches = prepared(config, name, device, untrained)
    params, times = step.stage.params, []
    progress = Progress(params)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2 * BATCHES if step.graphs else steps):  # warm up; the second batch of a kind records a graph
        step(next(batches), progress)
    for _ in range(rounds):
        began = seconds(device)
        for _ in range(steps):
            step(next(batches), progress)  # waits for its flags
        times.append(seconds(device) - began)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return steps * params.batch_size / statistics.median(times), peak


def profiled(config: TrainConfig, name: str, device: torch.device) -> tuple[int, float, float]:
    """Programs that one step starts on CUDA, milliseconds that they keep it busy, and milliseconds by the clock."""
    step, batches = prepared(config, name, device, untrained=True)
    progress = Progress(step.stage.params)
    for _ in range(2):
        step(next(batches), progress)
    began = seconds(device)
    with torch.profiler.profile() as profile:
        step(next(batches), progress)
        ended = seconds(device)
    programs = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(programs), sum(event.self_device_time_total for event in programs) / 1e3, 1e3 * (ended - began)


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
