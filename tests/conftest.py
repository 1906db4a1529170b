"""Shared by all tests: a fixed number of threads, nothing that would look for the network, and an end in any case."""

import faulthandler
import multiprocessing
import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_unconfigure():
    """A process that does not end after its tests, waiting for one that they left, tells where it stands and fails."""
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of five photographs."""
    from tests.commands import photograph

    folder = tmp_path_factory.mktemp("data")
    for seed in range(5):
        photograph(folder / f"{seed}.png", 90, 70, seed)
    return folder


@pytest.fixture(scope="session")
def processes():
    """A server whose children have imported already what a training takes seconds to import."""
    context = multiprocessing.get_context("forkserver")
    slow = ["models.rate_model", "torch._dynamo", "torch.utils.tensorboard"]
    context.set_forkserver_preload(["main_diffusion_train_vq", *slow])
    return context


@pytest.fixture(scope="session")
def saved_run(data, processes, tmp_path_factory):
    """The folder of a run of both stages, with all parts, that was never stopped and saved after every iteration."""
    from tests.small_runs import command, finished

    folder = tmp_path_factory.mktemp("saved")
    assert finished(processes, command(data, folder)) == 0
    return folder / "nano"
