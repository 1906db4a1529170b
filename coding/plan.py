"""Which input becomes which output, decided and checked before any work."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from utils.errors import DiffoError
from utils.files import PICTURES, find_files, tell_left_out

STREAM = ".dfo"


@dataclass(frozen=True)
class Job:
    """One input and the place of its outputs.

    Attributes:
        source: the picture or `.dfo` file.
        name: of the source, relative to the folder that was given.
        target: output path without its suffix; None where nothing is written.
        reference: the picture to compare with, where one was asked for.
    """

    source: Path
    name: str
    target: Path | None
    reference: Path | None = None

    def output(self, suffix: str) -> Path:
        return self.target.with_name(self.target.name + suffix)


def inputs(paths: list[Path], streams: bool, recursive: bool) -> list[tuple[Path, Path]]:
    """The files below `paths`, each with its name relative to the folder that was given.

    Says on stderr what a folder of pictures holds besides.

    Raises:
        DiffoError: a path that is not there, or a folder with nothing to do in it.
    """
    found = []
    for path in paths:
        if path.is_dir():
            others: Counter[str] = Counter()
            files = find_files(path, (STREAM,) if streams else PICTURES, recursive, others)
            besides = "" if streams else tell_left_out(others)
            if not files:
                kind = f"{STREAM} files" if streams else "pictures"
                deeper = "" if recursive else "; --recursive looks into its sub-folders"
                raise DiffoError(f"{path}: no {kind} in this folder{besides}{deeper}")
            if besides:
                print(f"{path}: {len(files)} picture{'s' * (len(files) > 1)}{besides}", file=sys.stderr)
            found += [(file, file.relative_to(path)) for file in files]
        elif path.is_file():
            found.append((path, Path(path.name)))
        else:
            raise DiffoError(f"{path}: no such file or folder")
    return found


def plan(
    files: list[tuple[Path, Path]], out: Path | None, references: Path | None, suffixes: list[str], tables: list[str]
) -> list[Job]:
    """Jobs for the files, with sub-folders mirrored below `out`.

    Args:
        suffixes: of the outputs that will be written, for instance [".dfo", ".png"].
        tables: names of the further files that will be written into `out`.
    Raises:
        DiffoError: two inputs with one stem, an output that would overwrite an input or a reference, two outputs of
            one name, or a missing reference.
    """
    jobs = []
    for source, relative in files:
        target = out / relative.with_suffix("") if out is not None else None
        jobs.append(Job(source, str(relative), target, _reference(references, relative)))
    if out is None:
        return jobs
    stems: dict[Path, Path] = {}
    taken = {job.reference.resolve(): "a reference" for job in jobs if job.reference}
    taken |= {job.source.resolve(): "an input" for job in jobs}
    written = [(out / name, f"the table {name}") for name in tables]
    for job in jobs:
        if other := stems.get(job.target):
            raise DiffoError(f"{other} and {job.source} would both become {job.output(suffixes[0]).name}; rename one")
        stems[job.target] = job.source
        written += [(job.output(suffix), "another output") for suffix in suffixes]
    for path, kind in written:
        if (owner := taken.setdefault(path.resolve(), kind)) != kind:
            raise DiffoError(f"{path}: this output would overwrite {owner}; choose another -o")
    return jobs


def _reference(references: Path | None, relative: Path) -> Path | None:
    """The picture of the same name, or, where there is exactly one, of the same stem."""
    if references is None or references.is_file():
        return references
    if not references.is_dir():
        raise DiffoError(f"{references}: no such file or folder (--ref_path)")
    folder = (references / relative).parent
    alike = [p for p in find_files(folder, PICTURES) if p.stem == relative.stem] if folder.is_dir() else []
    alike = [p for p in alike if p.name == relative.name] or alike
    if len(alike) != 1:
        count = f"{len(alike) or 'no'} picture{'s' * (len(alike) > 1)}"
        raise DiffoError(f"{references}: {count} named {relative.stem} to compare {relative} with (--ref_path)")
    return alike[0]
