"""Which input becomes which output, decided and checked before any work."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.errors import DiffoError
from utils.images import find_pictures

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

    @property
    def stream(self) -> Path:
        return self.target.with_name(self.target.name + STREAM)

    @property
    def picture(self) -> Path:
        return self.target.with_name(self.target.name + ".png")


def find_streams(folder: Path, recursive: bool) -> list[Path]:
    """Sorted `.dfo` files of a folder; hidden ones are skipped."""
    found = folder.rglob(f"*{STREAM}") if recursive else folder.glob(f"*{STREAM}")
    visible = (p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(p for p in visible if p.is_file())


def inputs(paths: list[Path], streams: bool, recursive: bool) -> list[tuple[Path, Path]]:
    """The files below `paths`, each with its name relative to the folder that was given.

    Raises:
        DiffoError: a path that is not there, or a folder with nothing to do in it.
    """
    kind = f"{STREAM} files" if streams else "pictures"
    find: Callable = find_streams if streams else find_pictures
    found = []
    for path in paths:
        if path.is_dir():
            files = [(file, file.relative_to(path)) for file in find(path, recursive)]
            if not files:
                deeper = "" if recursive else "; --recursive looks into its sub-folders"
                raise DiffoError(f"{path}: no {kind} in this folder{deeper}")
            found += files
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise DiffoError(f"{path}: no such file or folder")
    return found


def plan(files: list[tuple[Path, Path]], out: Path | None, references: Path | None, suffixes: list[str]) -> list[Job]:
    """Jobs for the files, with sub-folders mirrored below `out`.

    Args:
        suffixes: of the outputs that will be written, for instance [".dfo", ".png"].
    Raises:
        DiffoError: two inputs with one stem, an output that would overwrite an input, or a missing reference.
    """
    jobs, stems = [], {}
    sources = {source.resolve() for source, _ in files}
    for source, relative in files:
        target = None
        if out is not None:
            target = out / relative.with_suffix("")
            if target in stems:
                raise DiffoError(
                    f"{stems[target]} and {source} would both become {target.name}{suffixes[0]}; rename one"
                )
            stems[target] = source
            for suffix in suffixes:
                if target.with_name(target.name + suffix).resolve() in sources:
                    raise DiffoError(f"{target}{suffix}: this output would overwrite an input; choose another -o")
        jobs.append(Job(source, str(relative), target, _reference(references, relative)))
    return jobs


def existing_outputs(jobs: list[Job], suffixes: list[str]) -> list[Path]:
    """Outputs that are there already."""
    targets = (job.target.with_name(job.target.name + suffix) for job in jobs for suffix in suffixes)
    return [path for path in targets if path.exists()]


def _reference(references: Path | None, relative: Path) -> Path | None:
    """The picture of the same name, or, where there is exactly one, of the same stem."""
    if references is None:
        return None
    if references.is_file():
        return references
    same = references / relative
    if same.is_file():
        return same
    if not references.is_dir():
        raise DiffoError(f"{references}: no such file or folder (--ref_path)")
    alike = [p for p in find_pictures(same.parent, False) if p.stem == relative.stem] if same.parent.is_dir() else []
    if len(alike) != 1:
        count = "no picture" if not alike else f"{len(alike)} pictures"
        raise DiffoError(f"{references}: {count} named {relative.stem} to compare {relative} with (--ref_path)")
    return alike[0]
