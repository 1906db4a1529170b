"""Runs of the nano configuration in processes of their own or in this one, and what they leave."""

import json
import multiprocessing
import os
import resource
import signal
import sys
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import torch

from tests.commands import NANO, free_port

RESIDUAL = "{channels: 8, width: 8, blocks: 1, hyper_channels: 4, scale_width: 8, code_width: 4, levels: 3}"
ALL_PARTS = (f"networks.residual={RESIDUAL}", "networks.adapter=difference")
LIGHT = ("stages=[light]", "release=elsewhere", "networks.light={ch: [8, 4], num_res_blocks: [1, 1], groups: 2}")
TEXTURE = ("stages=[texture]", "release=elsewhere", "networks.texture={width: 4, num_res_blocks: 1}")
ALONE = {
    "light": LIGHT,
    "texture": TEXTURE,
    "decoder": ("stages=[decoder]", "release=elsewhere"),
}  # stages that no other comes before
SETTINGS = (
    "save_every=1",
    "keep_last=2",
    "gt.iterations=4",
    "codec.iterations=6",
    "gt.statistics=2",
    "gt.adversary.start=2",
    "codec.adversary={weight: 0.5, start: 3}",
    *ALL_PARTS,
)
NO_ADVERSARY = ("gt.adversary.weight=0", "codec.adversary.weight=0")  # small and quick, where it has no say


def command(data: Path, save_dir: Path, *options: str) -> list[str]:
    validation = (f"validation.folder={data}", "validation.every=2", "validation.limit=2")
    return ["--cfg_path", str(NANO), "--save_dir", str(save_dir), "--data", str(data), *SETTINGS, *validation, *options]


def quick(data: Path, save_dir: Path, *options: str) -> list[str]:
    return command(data, save_dir, *NO_ADVERSARY, "validation.folder=null", *options)


def train(args: list[str], told: str = os.devnull, largest: int | None = None) -> None:
    """The command in a process of its own, as a shell starts it.

    Args:
        told: file for its messages. largest: bytes that a file may have, which PyTorch meets as it meets a full disk.
    """
    os.setsid()
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the system's own
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests themselves may be told to ignore it
    torch.set_num_threads(1)
    for path, stream in ((os.devnull, 1), (told, 2)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    import training.adversary as adversary
    from main_diffusion_train_vq import main

    adversary.DISCRIMINATORS["patch"] = partial(
        adversary.PatchDiscriminator, width=8
    )  # 24 of 25 parts of what is written
    sys.exit(main(args))


def finished(context, *args) -> int:
    """Exit status of `train` in a process of its own."""
    process = context.Process(target=train, args=args)
    process.start()
    process.join()
    return process.exitcode


def ranks(context, world: int, target, *args) -> list[int]:
    """Exit statuses of `world` processes that are told of each other as by torchrun, and stopped where one fails."""
    port = free_port()
    started = [context.Process(target=ranked, args=(rank, world, port, target, *args)) for rank in range(world)]
    for process in started:
        process.start()
    while alive := [process for process in started if process.exitcode is None]:
        wait([process.sentinel for process in alive])
        if any(process.exitcode for process in started):
            for process in alive:
                process.kill()
    return [process.exitcode for process in started]


def ranked(rank: int, world: int, port: int, target, *args) -> None:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in told.items()})
    torch.set_num_threads(1)
    target(rank, *args)


def interrupted(data: Path, save_dir: Path, monkeypatch, *options: str) -> Path:
    """A run that is stopped before its third iteration of stage gt; its folder."""
    from main_diffusion_train_vq import main
    from training.step import Step

    plain = Step.__call__

    def step(self, batch, progress, stop=False):
        if progress.step == 2:
            raise KeyboardInterrupt
        return plain(self, batch, progress, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", step)
        assert main(quick(data, save_dir, *options)) == 130
    return save_dir / "nano"


def lines(folder: Path, name: str) -> list[dict]:
    """Logged numbers without times and memory."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    measured = ("pictures_per_second", "peak_memory_gib")
    return [{key: value for key, value in entry.items() if key not in measured} for entry in found]


def tree(folder: Path) -> set[str]:
    """Files of a run, hidden ones too, without TensorBoard's."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if path.parts[0] != "tensorboard"}
