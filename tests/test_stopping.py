"""Signals that ask to stop, and the processes that decode: they serve on, and end with the process that they serve."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import ROOT, run
from utils import stopping
from utils.stopping import StopRequest

SERVE = """
import multiprocessing, signal, sys
from datapipe.pictures import DataParams, Pictures, stream
from utils.stopping import StopRequest
batches = stream(Pictures(DataParams(sys.argv[1], workers=2), 32, 0), 2, 0, 1, 0)
"""
READING = """
with StopRequest() as stop:
    print("ready", flush=True)
    for _ in range(9):  # more than is decoded ahead
        next(batches)
    sys.stdin.read()
assert stop.number == signal.SIGTERM
for _ in range(9):
    next(batches)
print("served")
"""


def serving(code: str, data, folder) -> subprocess.Popen:
    command = [sys.executable, "-c", SERVE + code, str(data)]
    shown = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | {"TMPDIR": str(folder)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **shown)


@pytest.mark.parametrize("end", ["pass", "raise RuntimeError('a bug')"])
def test_workers_outlive_signals_and_end_with_a_process_that_fails(end, data, tmp_path):
    """It keeps its stream and waits, at its end, for the workers without limit."""
    process = serving(READING + end, data, tmp_path)
    assert process.stdout.readline() == "ready\n"
    for _ in range(100):  # from before the workers start until they serve, and from outside, as schedulers send them
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.01)
    told, errors = process.communicate(timeout=60)
    assert told == "served\n" and process.returncode == int("raise" in end), errors
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's workers look at their parent every 5 s elsewhere")
def test_workers_end_at_once_with_a_process_that_is_killed(data, tmp_path):
    """They have its log, by which it holds its folder, and its connections to other ranks. One temporary folder is all."""
    code = "next(batches)\nprint(*(w.pid for w in multiprocessing.active_children()), flush=True)\n"
    process = serving(code + "signal.pause()", data, tmp_path)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2 and all(alive(pid) for pid in workers) and len(list(tmp_path.iterdir())) == 1
    process.kill()
    process.wait()
    deadline = time.monotonic() + 3
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_children_are_asked_until_they_end():
    """A signal may be lost among others."""
    code = """
import multiprocessing, os, signal, time
from utils.stopping import end_children_at_exit
left = [1, 1]
def deaf(ready):
    signal.signal(signal.SIGTERM, lambda *_: left.pop() if left else os._exit(0))
    ready.set()
    while True:
        time.sleep(60)
if __name__ == "__main__":
    ready = multiprocessing.Event()
    multiprocessing.Process(target=deaf, args=(ready,), daemon=True).start()
    ready.wait()
    end_children_at_exit()
"""
    run("-c", code, timeout=60)


@pytest.fixture
def handlers():
    """Those of Python, whatever the tests themselves are told to ignore (`nohup`, `&` in a script)."""
    usual = {number: signal.SIG_DFL for number in stopping.ASKING} | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_again_is_the_same_request_until_some_time_has_passed(handlers, monkeypatch):
    """torchrun's, after the one that a scheduler has sent to all."""
    with StopRequest() as stop:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.number == signal.SIGHUP
        monkeypatch.setitem(stopping.ASKING, signal.SIGINT, 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_what_is_ignored_stays_ignored(handlers):
    """As nohup leaves it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert stop.number is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
