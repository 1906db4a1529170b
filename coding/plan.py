"""Which input becomes which output, decided and checked before any work."""

import os
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.errors import DiffoError
from utils.files import PICTURES, find_files, tell_left_out

STREAM = ".dfo"
OVERVIEW = "overview.png"


@dataclass(frozen=True)
class Job:
    """One input and the place of its outputs.

    Attributes:
        source: the picture or `.dfo` file.
        name: of the source, relative to the folder that was given.
        target: output path without its suffix.
        reference: the picture to compare with, where one was asked for.
    """

    source: Path
    name: str
    target: Path
    reference: Path | None = None

    def output(self, suffix: str) -> Path:
        return self.target.with_name(self.target.name + suffix)


def inputs(paths: list[Path], streams: bool, recursive: bool) -> list[tuple[Path, Path]]:
    """The files below `paths`, each once, with its name relative to the folder that was given.

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
            if besides and os.environ.get("RANK", "0") == "0":
                print(f"{path}: {len(files)} picture{'s' * (len(files) > 1)}{besides}", file=sys.stderr)
            found += [(file, file.relative_to(path)) for file in files]
        elif path.is_file():
            found.append((path, Path(path.name)))
        else:
            raise DiffoError(f"{path}: no such file or folder")
    once: dict[str, tuple[Path, Path]] = {}
    for file, relative in found:
        once.setdefault(os.path.abspath(file), (file, relative))
    return list(once.values())


def names_a_file(out: Path, suffixes: list[str], count: int) -> bool:
    """Whether -o is the name of one output, by its suffix, rather than of the folder for `count` inputs.

    Args:
        suffixes: of the outputs that will be written, for instance [".dfo", ".png"].
    Raises:
        DiffoError: it is, and no such file would be written, or there are several inputs.
    """
    if out.is_dir() or out.suffix.lower() not in (STREAM, *PICTURES):
        return False
    if out.suffix not in suffixes:
        raise DiffoError(f"{out}: what is written here ends in {' and '.join(suffixes)}; name such a file, or a folder")
    if count > 1:
        raise DiffoError(f"{out}: one file for {count} inputs; name a folder with -o DIR")
    return True


def plan(
    files: list[tuple[Path, Path]],
    out: Path,
    references: Path | None,
    suffixes: list[str],
    tables: list[str],
    known: Mapping[str, str] | None = None,
) -> list[Job]:
    """Jobs for the files, with sub-folders mirrored below `out`, which may be the one output's own name.

    An output takes its input's stem or, where that has been given away, its whole name: a.jpg, a.png -> a, a.png.

    Args:
        suffixes: of the outputs that will be written, for instance [".dfo", ".png"]; the first one's name must be free.
        tables: names of the further files that will be written into `out`.
        known: output of every input that is in the table of `out` already; it keeps that.
    Raises:
        DiffoError: two inputs of one name, an output that would overwrite an input or a reference, two outputs of one
            name, a missing reference, or as `names_a_file`.
    """
    if names_a_file(out, suffixes, len(files)):
        targets = [out.with_suffix("")]
    else:
        targets = [out / target for target in _targets(files, suffixes[0], known or {})]
    whole = {relative.with_name(relative.name.removesuffix(STREAM)) for _, relative in files}
    jobs = [
        Job(source, str(relative), target, _reference(references, relative, whole))
        for (source, relative), target in zip(files, targets, strict=True)
    ]
    taken = {job.reference.resolve(): "a reference" for job in jobs if job.reference}
    taken |= {job.source.resolve(): "an input" for job in jobs}
    written = [(out / name, f"the table {name}") for name in tables]
    written += [(job.output(suffix), "another output") for job in jobs for suffix in suffixes]
    for path, kind in written:
        if (owner := taken.setdefault(path.resolve(), kind)) != kind:
            raise DiffoError(f"{path}: this output would overwrite {owner}; choose another -o")
    return jobs


def _targets(files: list[tuple[Path, Path]], suffix: str, known: Mapping[str, str]) -> list[Path]:
    """Output names without `suffix`, as `plan` gives them. Raises DiffoError for two inputs of one name."""
    owners = {output: name for name, output in known.items() if output.endswith(suffix)}
    kept = {name: Path(output.removesuffix(suffix)) for output, name in owners.items()}
    sources: dict[Path, Path] = {}
    targets = []
    for source, relative in files:
        name = str(relative)
        choices = [kept[name]] if name in kept else [relative.with_suffix(""), relative]
        target = next((choice for choice in choices if owners.setdefault(f"{choice}{suffix}", name) == name), None)
        if (other := sources.setdefault(relative, source)) != source:
            raise DiffoError(f"{other} and {source} have one name: give each a folder of its own with -o")
        if target is None:
            raise DiffoError(f"{source}: other inputs have its names, {choices[0]} and {choices[-1]}; rename it")
        targets.append(target)
    return targets


def _reference(references: Path | None, relative: Path, whole: Collection[Path]) -> Path | None:
    """The picture of the same name, or of the same stem, where there is exactly one that is not another input's, `whole`."""
    if references is None or references.is_file():
        return references
    if not references.is_dir():
        raise DiffoError(f"{references}: no such file or folder (--ref_path)")
    folder = (references / relative).parent
    there = find_files(folder, PICTURES) if folder.is_dir() else []
    alike = [p for p in there if p.name in (relative.name, relative.stem)]  # a.png of a.png.dfo
    alike = alike or [p for p in there if p.stem == relative.stem and relative.with_name(p.name) not in whole]
    if len(alike) != 1:
        count = f"{len(alike) or 'no'} picture{'s' * (len(alike) > 1)}"
        raise DiffoError(f"{references}: {count} named {relative.stem} to compare {relative} with (--ref_path)")
    return alike[0]
