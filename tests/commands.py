"""Running the project's commands as a user does: in processes of their own, from the repository's folder."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "tests" / "nano.yaml"
TRAIN = ROOT / "main_diffusion_train_vq.py"


def run(*args, threads: int = 1, expect: int = 0, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run `python ARGS`; its exit status must be the expected one, and bad input must not give a traceback."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == expect, f"{args}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def free_port() -> int:
    """A port of this machine for the processes of a test to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def photograph(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """Write a smooth coloured picture."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def grey_values(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def on_board(folder: Path, name: str):
    """TensorBoard's view of one folder of a run's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard" / name), {"scalars": 0, "images": 0}).Reload()


def call(capsys, *args) -> tuple[int, str, str]:
    """inference.py in this process: exit status, stdout, stderr."""
    from inference import main

    try:
        status = main([str(a) for a in args])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err
