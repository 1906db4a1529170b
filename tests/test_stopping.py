"""Signals that ask to stop, and the processes that decode: they serve on, and end with the process that they serve."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import ROOT
from utils import stopping
from utils.stopping import StopRequest

SERVE = """
import contextlib, multiprocessing, os, signal, sys
from datapipe.pictures import DataParams, Pictures, stream
from utils.stopping import StopRequest
with StopRequest() as stop, contextlib.closing(stream(Pictures(DataParams(sys.argv[1], workers=2), 32, 0), 2, 0, 1, 0)) as s:
    next(s)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
"""
ENDS = {
    "asked": ("    while stop.number is None: next(s)\n    for _ in range(9): next(s)\n    sys.exit(3)", "", 3),
    "fails": ("    raise ValueError('a bug')", "ValueError: a bug", 1),
    "loses a worker": (
        "    multiprocessing.active_children()[0].kill()\n    while True: next(s)",
        "Error",
        1,
    ),
}


@pytest.mark.skipif(not hasattr(os, "setsid"), reason="workers are not parted from their group")
@pytest.mark.parametrize("how", ENDS)
def test_workers_end_with_the_process_that_they_serve(how, data):
    """A signal to the whole group reaches it alone: it is served on until it ends."""
    code, message, status = ENDS[how]
    command = [sys.executable, "-c", SERVE + code, str(data)]
    shown = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **shown)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    if how == "asked":
        os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status and message in errors, errors
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)


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
        monkeypatch.setattr(stopping, "GRACE", 0.0)
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
