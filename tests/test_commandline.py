"""How a command ends whose output cannot be written, and what every command says of itself."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from coding import options
from tests.commands import ROOT, run
from utils.commandline import command_line
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


@pytest.mark.parametrize(
    "work", ["sys.exit(answer(os.kill, *signal_to_itself))", "with loading(): os.kill(*signal_to_itself)"]
)
def test_an_interrupt_is_one_line_and_130(work):
    """In what `answer` calls, and while modules are loaded."""
    program = "import os, signal, sys\nfrom utils.commandline import answer, loading\n"
    program += f"signal_to_itself = os.getpid(), signal.SIGINT\n{work}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_commands_begin_to_answer_before_anything_heavy_is_imported():
    program = "import sys, inference, reproduce, release.__main__; print(*sys.modules)"
    loaded = run("-c", program).stdout.split()
    assert not {"torch", "matplotlib", "PIL"} & set(loaded)


def test_no_command_takes_abbreviated_options(capsys):
    from datapipe import prepare
    from release import import_weights

    for parse, line in [
        (prepare.parse, "shards pictures -o x --max_m 3"),
        (prepare.parse, "list pictures --ou x"),
        (import_weights.parse, "diffo --ck a --vqckpt b --GT_vqckpt c out"),
        (options.parse, "-i a.png --out x"),
    ]:
        with pytest.raises(SystemExit):
            parse(line.split())
        assert "error: " in capsys.readouterr().err


def test_every_command_tells_the_one_version(capsys):
    files = [path.relative_to(ROOT) for place in (".", "*") for path in ROOT.glob(f"{place}/*.py")]
    commands = {
        path for path in files if path.parts[0] != "tests" and 'if __name__ == "__main__":' in (ROOT / path).read_text()
    }
    assert {Path("inference.py"), Path("release/__main__.py"), Path("benchmarks/train.py")} < commands
    for path in commands:
        name = ".".join(path.with_suffix("").parts)
        name = {"inference": "coding.options", "release.__main__": "release.from_run"}.get(name, name)
        with pytest.raises(SystemExit) as end:
            importlib.import_module(name).parse(["--version"])
        assert end.value.code == 0 and capsys.readouterr().out == f"DiffO {__version__}\n", path


def test_the_line_that_was_given_can_be_pasted(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert command_line("reproduce.py", ["rates", "a b", "$c"]) == "python reproduce.py rates 'a b' '$c'"
    assert command_line("-m benchmarks.cuda", ["-o", "x"]) == "python -m benchmarks.cuda -o x"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command_line("reproduce.py", ["all"]) == "torchrun --nproc_per_node=2 reproduce.py all"


def test_the_citation_file_is_of_this_project():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and "version" not in cited  # which stands in utils/version.py alone
    paper, bibtex = cited["preferred-citation"], (ROOT / "README.md").read_text()
    for told in (paper["title"], str(paper["year"]), *(author["family-names"] for author in paper["authors"])):
        assert told in bibtex
