"""Shared by all tests: a fixed number of threads, nothing that would look for the network, and an end in any case."""

import faulthandler
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_unconfigure():
    """A process that does not end after its tests, waiting for one that they left, tells where it stands and fails."""
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
