"""Training speed and memory with each option of the block `speed`, against plain float32 in the same run.

    python -m benchmarks.train --config configs/tiny.yaml
    python -m benchmarks.train --width 128 --stages codec codec.batch_size=1
    python -m benchmarks.train --options defaults --losses 200
    python -m benchmarks.train --stages codec autoencoder=weights/tiny-2/GT_vq_model_5000.pth.tar

Every option trains in a process of its own, beside one of plain float32; the two take turns, round by round, so that
whatever else the machine does slows both. Times are of whole steps (forward, losses, backward, update, averages) on
batches that are there already; a ratio is the median of the rounds' ratios. Beside it stands the same of processor
time, which is steadier where others use the machine (and says nothing of a GPU's). Peak memory is the process's own
(resident on the CPU, allocated tensors on CUDA). Loading pictures is not measured.

Losses (`--losses N`) are compared over several seeds: a short training is chaotic, and what two runs of one seed differ
by in rounding alone shows in their losses.
"""

import argparse
import math
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import replace
from itertools import islice, product

import torch

from datapipe.pictures import Pictures, stream
from training.config import TrainConfig, load_config
from training.speed import Speed, SpeedParams, has_bfloat16
from training.stages import STAGES
from training.start import new_codec, start_from
from utils import distributed
from utils.commandline import answer, positive
from utils.errors import DiffoError

PLAIN = SpeedParams("float32", channels_last=False, fused_adamw=False, keep_memory=False)
OPTIONS = {
    "channels_last": replace(PLAIN, channels_last=True),
    "fused_adamw": replace(PLAIN, fused_adamw=True),
    "keep_memory": replace(PLAIN, keep_memory=True),
    "checkpointing": replace(PLAIN, checkpointing=True),
    "compile": replace(PLAIN, compile=True),
    "tf32": replace(PLAIN, tf32=True),
    "bfloat16": replace(PLAIN, precision="bfloat16"),
    "defaults": SpeedParams(),
    "defaults+compile": SpeedParams(compile=True),
    "plain": PLAIN,  # against itself: what the machine's noise alone gives
}
OWN = "config"  # the configuration's own block, overrides included
KNOWN = (*OPTIONS, OWN)
BATCHES = 8  # different ones, again and again
SIGNIFICANT = 0.05


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml", metavar="YAML")
    parser.add_argument("--options", nargs="+", metavar="NAME", help=f"of: {', '.join(KNOWN)}")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help=f"of: {', '.join(STAGES)}")
    parser.add_argument("--width", type=positive, metavar="C", help="networks of C channels at every level instead")
    parser.add_argument("--steps", type=positive, default=4, metavar="N", help="steps of a round (default: 4)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="rounds of each (default: 5)")
    parser.add_argument("--losses", type=positive, metavar="N", help="compare the losses of N steps instead of times")
    parser.add_argument(
        "--seeds",
        type=positive,
        default=6,
        metavar="S",
        help="runs of each with --losses (default: 6; fewer can show no difference)",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    for name, known in (("options", KNOWN), ("stages", STAGES)):
        given = getattr(args, name) or []
        names = [value for value in given if "=" not in value]  # argparse gives them all that follows
        args.overrides += [value for value in given if "=" in value]
        if unknown := [value for value in names if value not in known]:
            parser.error(f"--{name} {unknown[0]}: none of {', '.join(known)}")
        setattr(args, name, names or None)
    args.stages = args.stages or list(STAGES)
    return args


def widened(width: int) -> list[str]:
    """Overrides that make every network as wide at each of its levels."""
    groups = math.gcd(32, width // 2)
    return [
        f"networks.autoencoder.ch={width}",
        "networks.autoencoder.ch_mult=[1,1,1,1,1]",
        f"networks.autoencoder.groups={groups}",
        f"networks.vq_base.ch={width}",
        "networks.vq_base.ch_mult=[1]",
        f"networks.vq_base.groups={groups}",
        f"networks.unet.model_channels={width}",
        "networks.unet.channel_mult=[1,1,1,1]",
        f"networks.unet.swin_embed_dim={width}",
        f"networks.unet.head_channels={min(32, width)}",
        f"networks.unet.groups={groups}",
    ]


def with_option(config: TrainConfig, name: str) -> TrainConfig:
    return config if name == OWN else replace(config, speed=OPTIONS[name])


class Runner:
    """A stage that trains on a few batches, over and over."""

    def __init__(self, config: TrainConfig, name: str, device: torch.device):
        Speed(config.speed, device).settle()
        params = getattr(config, name)
        codec = new_codec(config).to(device)
        start_from(config, codec)
        self.stage = STAGES[name](config, codec, device)
        self.device, self.size, self.taken = device, params.batch_size, 0
        pictures = Pictures(replace(config.data, workers=0), params.crop_size, config.seed)
        self.batches = list(islice(stream(pictures, params.batch_size, 0, 1, 0), BATCHES))

    def step(self) -> float:
        """One update; its loss."""
        image, _ = self.batches[self.taken % BATCHES]
        positions = torch.arange(self.size) + self.taken * self.size
        logs, _ = self.stage.step(image.to(self.device), positions, self.taken)
        self.taken += 1
        return logs["loss"]

    def seconds(self, steps: int) -> tuple[float, float]:
        """Elapsed, and of processor time."""
        self._synchronise()
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        self._synchronise()
        return time.perf_counter() - began, time.process_time() - busy

    def peak(self) -> float:
        """MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def serve(pipe, *what) -> None:
    """A process's work: build a Runner, then do what is asked until None is."""
    runner = Runner(*what)
    while (request := pipe.recv()) is not None:
        method, *values = request
        pipe.send([runner.step() for _ in range(*values)] if method == "losses" else getattr(runner, method)(*values))


class Worker:
    """A Runner in a process of its own."""

    def __init__(self, *what):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *what), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *request):
        try:
            self.pipe.send(request)
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise DiffoError("a benchmark process ended early: see above (out of memory?)") from error

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.join()


def measure(config: TrainConfig, stage: str, names: list[str], device: torch.device, steps: int, rounds: int) -> None:
    pictures = steps * getattr(config, stage).batch_size
    head = f"{'pictures/s':>12}{'ratio':>8}{'(rounds)':>16}{'processor':>11}{'peak MiB':>10}{'ratio':>8}"
    print(f"{'stage ' + stage:18}{head}", flush=True)
    with Worker(replace(config, speed=PLAIN), stage, device) as plain:
        plain.ask("seconds", 2)  # warm-up
        everything, base = [], 0.0
        for name in names:
            with Worker(with_option(config, name), stage, device) as option:
                option.ask("seconds", 2)
                pairs = [(plain.ask("seconds", steps), option.ask("seconds", steps)) for _ in range(rounds)]
                memory, base = option.ask("peak"), plain.ask("peak")
            everything += [elapsed for (elapsed, _), _ in pairs]
            ratios = [theirs[0] / ours[0] for theirs, ours in pairs]
            busy = statistics.median(theirs[1] / ours[1] for theirs, ours in pairs)
            rate = pictures / statistics.median(ours[0] for _, ours in pairs)
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            speed = f"{rate:12.2f}{statistics.median(ratios):8.2f}{spread:>16}{busy:11.2f}"
            print(f"{name:18}{speed}{memory:10.0f}{memory / base:8.2f}", flush=True)
        rate = pictures / statistics.median(everything)
        print(f"{'plain float32':18}{rate:12.2f}{1:8.2f}{'':16}{1:11.2f}{base:10.0f}{1:8.2f}", flush=True)


def chance(differences: list[float]) -> float:
    """How likely a mean at least as far from 0 is where the sign of each difference is a coin's: the exact paired test.

    With fewer than six differences it is never below 0.05.
    """
    found = abs(sum(differences)) * (1 - 1e-9)  # the same sum in another order must count
    flips = [abs(sum(flipped)) for flipped in product(*((d, -d) for d in differences))]
    return sum(flip >= found for flip in flips) / len(flips)


def compare(config: TrainConfig, stage: str, names: list[str], device: torch.device, steps: int, seeds: int) -> bool:
    """Mean loss of the last quarter of N steps, seed by seed; whether no option's differs from plain float32's."""
    last = max(1, steps // 4)

    def tails(name: str) -> list[float]:
        found = []
        for seed in range(config.seed, config.seed + seeds):
            with Worker(replace(with_option(config, name), seed=seed), stage, device) as worker:
                found.append(statistics.mean(worker.ask("losses", steps)[-last:]))
        print(f"{name:18}{statistics.mean(found):10.5f}   {' '.join(f'{loss:.4f}' for loss in found)}", flush=True)
        return found

    print(f"stage {stage}, mean loss of steps {steps - last} to {steps}, over the seeds and of each", flush=True)
    plain, within = tails("plain"), True
    for name in names:
        differences = [ours - theirs for ours, theirs in zip(tails(name), plain, strict=True)]
        p = chance(differences)
        within &= p >= SIGNIFICANT
        verdict = "within noise" if p >= SIGNIFICANT else "OUTSIDE noise"
        print(f"{'':18}{statistics.mean(differences):+10.5f}   p = {p:.2f}, {verdict}", flush=True)
    return within


def default_options(device: torch.device) -> list[str]:
    names = [name for name in OPTIONS if name != "plain"]
    cuda = device.type == "cuda"
    left_out = {"keep_memory"} if cuda else {"tf32"}
    if not has_bfloat16(device):
        print("bfloat16 is left out: this device only emulates it (--options bfloat16 measures it all the same)")
        left_out.add("bfloat16")
    return [name for name in names if name not in left_out]


def bench(args: argparse.Namespace) -> int:
    device = distributed.local_device(args.device)
    config = load_config(args.config, [*(widened(args.width) if args.width else []), *args.overrides])
    names = args.options or [*default_options(device), *([OWN] if config.speed != SpeedParams() else [])]
    print(f"{args.config}{f', width {args.width}' if args.width else ''}, {device}, {torch.get_num_threads()} threads")
    if args.losses:
        return int(not all([compare(config, stage, names, device, args.losses, args.seeds) for stage in args.stages]))
    for stage in args.stages:
        measure(config, stage, names, device, args.steps, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(answer(bench, parse()))
