"""Every command, key, option, file and link in README.md and docs/ exists: commands go through their programs' own parsers."""

import contextlib
import importlib
import io
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest

import inference
from tests.commands import ROOT, photograph
from training.config import load_config
from utils.config import to_mapping
from utils.errors import DiffoError

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CARD = ROOT / "weights" / "README.md"
TO_FILL_IN = "TODO-NUMBERS"

PROGRAMS = {
    "inference.py": "coding.options",
    "main_diffusion_train_vq.py": "main_diffusion_train_vq",
    "reproduce.py": "reproduce",
    "-m release": "release.from_run",
    "-m release.import_weights": "release.import_weights",
    "-m training.curves": "training.curves",
    "-m datapipe.prepare": "datapipe.prepare",
    "-m benchmarks.folder": "benchmarks.folder",
    "-m benchmarks.cuda": "benchmarks.cuda",
    "-m benchmarks.train": "benchmarks.train",
    "-m benchmarks.hostile": "benchmarks.hostile",
    "-m benchmarks.steady": "benchmarks.steady",
    "-m benchmarks.rehearse": "benchmarks.rehearse",
}
# Told, not run: of the system, of Python's packages, of programs that are not the project's.
OTHERS = {".", "conda", "head", "pip", "tensorboard"}
FOREIGN_OPTIONS = {"--shutdown-timeout", "--shm-size", "--index-url"}
SECTIONS = "networks|data|gt|codec|decoder|light|texture|speed|validation"
FOLDERS = "benchmarks|coding|configs|datapipe|docs|experiments|measuring|models|release|tests|training|utils|weights"

each_page = pytest.mark.parametrize("page", [*PAGES, CARD], ids=lambda page: str(page.relative_to(ROOT)))


# What a page says ------------------------------------------------------------------------------------------------------


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def indented(text: str) -> list[str]:
    """Lines of code blocks, those that end in a backslash joined with the next ones."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"(?:^|\n)\n((?: {4,}\S.*\n)+)", text)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def spans(text: str) -> list[str]:
    """Inline code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def commands(text: str) -> list[str]:
    """Lines of code blocks that begin with a program, and inline code that does, one command each."""
    begins = re.compile(r"(\.venv/bin/)?(python\S*|pip|torchrun|make|pytest) ")
    lines = [line.strip() for line in indented(text)]
    lines = [line for line in lines if not re.match(r"[\d ]+$", line)]  # a pattern of numbers
    return lines + [span for span in spans(text) if begins.match(span + " ") and "=" not in span.split()[0]]


def words_of(line: str) -> list[list[str]]:
    """The commands of a shell's line, without comments and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    found: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if word in (">", "<"):
            next(words)
        elif set(word) <= set(";&|"):
            found.append([])
        else:
            found[-1].append(word)
    return [command for command in found if command]


# What it must stand for ------------------------------------------------------------------------------------------------


def check(words: list[str]) -> None:
    """Raises SystemExit, DiffoError or AssertionError for a command that could not be run as it stands."""
    if words[0] == "/usr/bin/time":
        words = words[2:]
    name, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if name == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(rest)
        check(["python", args.training_script, *args.training_script_args])
    elif name == "make":
        made = subprocess.run(["make", "-n", "PYTHON=python3", *rest], cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        for line in made.stdout.splitlines():
            if re.match(r"\.venv/bin/python (?!-m pip|-m pytest|-m ruff|-m venv)", line):
                check(shlex.split(line))
    elif name == "pytest":
        for word in rest:
            assert word.startswith("-") or (ROOT / word).exists(), word
    elif name.startswith("python"):
        check_python(rest)
    else:
        assert name in OTHERS, f"{name}: known to no check"


def check_python(rest: list[str]) -> None:
    if rest[:2] == ["-m", "venv"]:
        return
    program, arguments = (" ".join(rest[:2]), rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])
    assert program in PROGRAMS, f"python {program}: known to no check"
    module = importlib.import_module(PROGRAMS[program])
    if not arguments and not program.startswith("-m benchmarks"):
        return  # the program's name alone
    parsed = module.parse(arguments)
    if program == "main_diffusion_train_vq.py" and not parsed.resume:
        parsed.dry_run = True  # nothing that is named has to be there
        module.configure(parsed)


def check_key(text: str) -> None:
    """`a.b.c`, `a.b=c` or `a.b: c`: a key of the configuration, and a value that it takes."""
    key, separator, value = re.fullmatch(r"([\w.]+)(?:(=|: )(.*))?", text).groups()
    node = to_mapping(load_config("configs/rates.yaml"))
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    assert last in node or parents[-1] == "perceptual", text
    if separator == "=":
        load_config("configs/rates.yaml", [f"{key}={value}"])


@cache
def options() -> set[str]:
    """Every option of every program, as its help tells it."""
    from torch.distributed.run import get_args_parser

    found = {option for action in get_args_parser()._actions for option in action.option_strings}
    for name in set(PROGRAMS.values()):
        parse = importlib.import_module(name).parse
        told = help_of(parse)
        for command in re.findall(r"^ {4}(\w+) ", told, re.MULTILINE):  # of those that have commands
            told += help_of(parse, command)
        found |= set(re.findall(r"--\w+", told))
    return found | FOREIGN_OPTIONS


def help_of(parse, *words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        parse([*words, "--help"])
    return out.getvalue()


@cache
def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def failures(items, checked) -> list[str]:
    found = []
    for item in items:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                checked(item)
        except (SystemExit, DiffoError, AssertionError, KeyError) as error:
            if isinstance(error, SystemExit) and not error.code:
                continue  # --help
            told = errors.getvalue().strip().splitlines() or [repr(error)]
            found.append(f"{item}\n    {told[-1]}")
    return found


# Tests -----------------------------------------------------------------------------------------------------------------


@each_page
def test_every_command_is_one_that_its_program_takes(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = failures(commands(page.read_text()), lambda line: [check(words) for words in words_of(line)])
    assert not wrong, "\n".join(wrong)


@each_page
def test_keys_options_and_files_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    if page.name == "CHANGELOG.md":
        return  # which names what is gone
    code = spans(page.read_text())
    keys = [span for span in code if re.fullmatch(rf"({SECTIONS})\.(?!jsonl)[\w.]+((=|: )[^ ]+)?", span)]
    named = [option for span in code for option in re.findall(r"(?<!\S)--[a-zA-Z_-]+", span)]
    files = [span for span in code if re.fullmatch(rf"({FOLDERS})/[\w/.-]+\.(py|yaml|md|json)", span)]
    wrong = failures(keys if page.name != "api.md" else [], check_key)  # there `codec` is an object
    wrong += [f"{option}: no program has it" for option in named if option not in options()]
    wrong += [f"{name}: no such file" for name in files if not (ROOT / name).is_file()]
    assert not wrong, "\n".join(wrong)


@each_page
def test_links_lead_somewhere(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            wrong.append(target)
    assert not wrong, wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_shell_could_read_as_a_pattern_is_quoted(page):
    """`stages=[codec]` is an error in zsh: no matches found."""
    bare = [
        line for line in commands(page.read_text()) if re.search(r"\[", re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line))
    ]
    assert not bare, bare


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)  # the README's: tests/test_api.py
def test_examples_in_python_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photograph(tmp_path / "photo.jpg", 64, 48)
    for example in fences(page.read_text(), "python"):
        exec(compile(example.replace("path/to/DiffO", str(ROOT)), str(page), "exec"), {})


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "coding.md"], ids=lambda page: page.name)
def test_lines_that_code_pictures_run_one_after_the_other(page, tmp_path, monkeypatch):
    """With the weights that ship; those of other weights and of placeholders are left out."""
    monkeypatch.chdir(tmp_path)
    for name in ("photo.jpg", "pictures/a.png"):
        photograph(tmp_path / name, 384, 256)
    ran = 0
    for words in [words for line in indented(page.read_text()) for words in words_of(line)]:
        if words[0] == "head":
            (tmp_path / "cut.dfo").write_bytes((tmp_path / words[-1]).read_bytes()[: int(words[2])])
        elif words[1:2] == ["inference.py"] and not {"--weights", "{input_path}"} & set(words):
            assert inference.main(words[2:]) == 0, words
            ran += 1
    assert ran == {"README.md": 5, "coding.md": 9}[page.name]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@each_page
def test_no_figure_is_left_to_fill_in(page):
    lines = [n for n, line in enumerate(page.read_text().splitlines(), 1) if TO_FILL_IN in line]
    assert not lines, f"{page.relative_to(ROOT)} has {TO_FILL_IN} in lines {', '.join(map(str, lines))}"


def test_the_checks_notice_what_is_wrong(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = ["python inference.py -i a.png -o out --qualty 3", "make tset", "python nothing.py", "frobnicate"]
    lines += ["torchrun --nprocs=2 main_diffusion_train_vq.py", "python -m release runs/a"]
    lines += ["python main_diffusion_train_vq.py --cfg_path configs/none.yaml", "pytest tests/none.py"]
    lines += ["python main_diffusion_train_vq.py --cfg_path configs/tiny.yaml codec.optim.rl=1"]
    wrong = failures(lines, lambda line: [check(words) for words in words_of(line)])
    assert [told.splitlines()[0] for told in wrong] == lines
    assert len(failures(["codec.optim.rl", "gt.nothing=1", "codec.ema=2", "codec.ema"], check_key)) == 3
    text = "So:\n\n    make test    # one\n    python a.py \\\n        -o b > c; head d\n\nand `make lint`.\n"
    assert [words_of(line) for line in commands(text)] == [
        [["make", "test"]],
        [["python", "a.py", "-o", "b"], ["head", "d"]],
        [["make", "lint"]],
    ]
