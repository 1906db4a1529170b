"""How a command ends whose output cannot be written, and what every command says of itself."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.commands import ROOT
from utils.version import __version__

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


def test_every_command_tells_the_one_version(capsys):
    files = [path.relative_to(ROOT) for place in (".", "*") for path in ROOT.glob(f"{place}/*.py")]
    commands = {
        path for path in files if path.parts[0] != "tests" and 'if __name__ == "__main__":' in (ROOT / path).read_text()
    }
    assert {Path("inference.py"), Path("release/__main__.py"), Path("benchmarks/train.py")} < commands
    for path in commands:
        name = "coding.options" if path.stem == "inference" else ".".join(path.with_suffix("").parts)
        with pytest.raises(SystemExit) as end:
            importlib.import_module(name).parse(["--version"])
        assert end.value.code == 0 and capsys.readouterr().out == f"DiffO {__version__}\n", path


def test_the_citation_file_is_of_this_project():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and "version" not in cited  # which stands in utils/version.py alone
    paper, bibtex = cited["preferred-citation"], (ROOT / "README.md").read_text()
    for told in (paper["title"], str(paper["year"]), *(author["family-names"] for author in paper["authors"])):
        assert told in bibtex
