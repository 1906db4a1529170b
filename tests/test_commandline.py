"""How a command ends whose output cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

COMMAND = "import sys; from utils.commandline import answer; sys.exit(answer(print, 'x' * int(sys.argv[1])))"


@pytest.fixture(params=[10, 100_000], ids=["kept", "written"])
def told(request):
    """Few characters are kept until the end, many are written at once."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    args = [sys.executable, "-c", COMMAND, str(request.param)]
    return lambda stdout: subprocess.run(
        args, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
    )


def test_a_reader_that_has_gone_is_no_news(told):
    reader, writer = os.pipe()
    os.close(reader)
    done = told(writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_closed_output_is_no_error():
    """`>&-`, as daemons have it."""
    command = f'{sys.executable} -c "{COMMAND}" 10 >&-'
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_onto_a_full_disk_is_one_line(told):
    with open("/dev/full", "w") as full:
        done = told(full)
    line = "error: output or a temporary file cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)
