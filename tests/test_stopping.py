"""Signals that ask to stop, and the processes that decode: they serve on, and end with the process that they serve."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from main_diffusion_train_vq import main
from tests.commands import ROOT
from tests.small_runs import quick
from utils import checkpoints, stopping
from utils.stopping import StopRequest

SERVE = """
import multiprocessing, signal, sys
from datapipe.pictures import DataParams, Pictures, stream
from utils.stopping import StopRequest
batches = stream(Pictures(DataParams(sys.argv[1], workers=2), 32, 0), 2, 0, 1, 0)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
with StopRequest() as stop:
    for _ in range(9):  # more than is decoded ahead
        next(batches)
    print("ready", flush=True)
    sys.stdin.read()
    assert stop.number == signal.SIGINT
    for _ in range(9):
        next(batches)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("end", ["pass", "raise RuntimeError('a bug')", "killed"])
def test_workers_serve_on_and_end_with_their_process(end, data, tmp_path):
    """Ctrl-C reaches the whole group. PyTorch's workers look every 5 s whether their parent lives."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE + end.replace("killed", "signal.pause()"), str(data)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2 and all(map(alive, workers)) and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    if end == "killed":
        process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {"pass": 0, "killed": -signal.SIGKILL}.get(end, 1), errors
    deadline = time.monotonic() + 20 * (end == "killed")
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers)) and (end == "killed" or not list(tmp_path.iterdir()))


@pytest.fixture
def handlers():
    """Those of Python, whatever the tests themselves are told to ignore (`nohup`, `&` in a script)."""
    usual = {number: signal.SIG_DFL for number in stopping.ASKING} | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_again_is_the_same_request_until_some_time_has_passed(handlers, monkeypatch):
    """torchrun's, after the one that a scheduler has sent to all. What is ignored, as nohup leaves it, stays so."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number is None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.number == signal.SIGINT
        monkeypatch.setattr(stopping, "GRACE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert {n: signal.getsignal(n) for n in handlers} == handlers | {signal.SIGHUP: signal.SIG_IGN}


def test_a_second_ctrl_c_ends_at_once_unless_torchrun_repeats_it(handlers, monkeypatch):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    monkeypatch.setenv("RANK", "0")
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT


def test_a_second_ctrl_c_while_saving_leaves_the_checkpoint_before(handlers, data, tmp_path, monkeypatch, capsys):
    plain = torch.save

    def interrupted(content, file):
        if content.get("step") == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        plain(content, file)

    monkeypatch.setattr(torch, "save", interrupted)
    assert main(quick(data, tmp_path, "stages=[gt]")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    folder = tmp_path / "nano"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["gt_1.pth"]
    assert checkpoints.read(folder / "checkpoints" / "gt_1.pth")["step"] == 1
