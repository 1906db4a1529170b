"""Pictures coded by releases and by other codecs: one row for each, its file, what that decodes to, and its scores."""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from statistics import fmean

from torch import Tensor
from tqdm import tqdm

from coding import budget
from coding.plan import STREAM
from coding.report import Row
from coding.table import Table
from experiments.baselines import BASELINES, Baseline
from experiments.inputs import about, checksum, named_photographs, weights_of
from experiments.patch_distances import add_distances
from experiments.summary import mean_of
from measuring.evaluator import Evaluator
from measuring.metrics import bpp
from measuring.patches import PatchDistances
from models.bitstream import WHOLE, unpack
from models.codec import Codec
from models.records import ONE_STEP, Analysed, Sampling
from utils.distributed import gather_objects, is_main, local_device, rank, world_size
from utils.errors import BudgetError, DiffoError
from utils.files import atomic_write, make_folder
from utils.images import read_image, write_image

KEY = ("codec", "label", "picture")
# --by: which bytes of other codecs' files are counted, here and in rates; of ours all are.
COUNTED = {"file": "of whole files", "payload": "other codecs' without containers, ours of whole files"}


@dataclass(frozen=True)
class Variant:
    """A release at one quality or budget, decoded in one way: a point of a curve, or a row of a table.

    Attributes:
        codec, label: names of its rows, and of the folders of its files. model: the networks.
        quality: 0, the base alone, to 100. bpp: instead of it, bits per pixel that a file has at most, at the scale that
        suits (`coding.budget.fit_scaled`). sampling: how to denoise.
    """

    codec: str
    label: str
    model: Codec
    quality: float = 0.0
    sampling: Sampling = ONE_STEP
    bpp: float | None = None

    @property
    def setting(self) -> str:
        """Quality or budget, and sampling, in words."""
        steps = self.sampling.steps
        rate = f"quality {self.quality:g}" if self.bpp is None else f"at most {self.bpp:g} bits per pixel"
        return f"{rate}, " + ("one step" if steps is None else f"{steps} of the schedule's steps")

    @property
    def made_from(self) -> str:
        rule = "" if self.bpp is None else f", base share {budget.BASE_SHARE:g}"
        return f"{weights_of(self.model)}, {self.setting}{rule}"

    def file(self, analyse: Callable[[int], Analysed]) -> bytes:
        """The file of a picture, of which `analyse` gives any scale, as `Codec.analyse`. Raises BudgetError."""
        whole = analyse(WHOLE)
        if self.bpp is None:
            return self.model.write(whole, self.model.level_code(self.quality))
        max_bytes = budget.bytes_of_bpp(self.bpp, whole.file.height, whole.file.width)
        return budget.fit_scaled(self.model, max_bytes, analyse).data


def evaluator_of(args: argparse.Namespace) -> Evaluator:
    """The evaluator of --metrics; says which of them cannot be had, and why. Raises DiffoError for an unknown name."""
    evaluator = Evaluator(args.metrics, local_device(args.device))
    _say_left_out(evaluator.left_out)
    return evaluator


def baselines_of(names: Sequence[str], releases: Iterable[str], option: str = "--codecs") -> list[Baseline]:
    """Other codecs by name; says which of them cannot be had, and why.

    Raises DiffoError for a name of `option` that is unknown, or a release of another codec's name: rows would mix.
    """
    if unknown := [name for name in names if name not in BASELINES]:
        raise DiffoError(f"{option} {unknown[0]}: unknown; known are {', '.join(BASELINES)}")
    if clash := sorted(set(releases) & set(BASELINES)):
        raise DiffoError(f"--weights: a release is called {clash[0]}, as another codec is; rename its folder")
    lacking = {name: reason for name in names if (reason := BASELINES[name].unavailable())}
    _say_left_out(lacking)
    return [BASELINES[name] for name in dict.fromkeys(names) if name not in lacking]


def distances_of(names: Sequence[str], device: str) -> PatchDistances:
    """Distances by name; says which cannot be had, and why. Raises DiffoError for an unknown name."""
    distances = PatchDistances(names, local_device(device))
    _say_left_out(distances.left_out)
    return distances


def _say_left_out(reasons: Mapping[str, str]) -> None:
    if is_main():
        for reason in reasons.values():
            print(f"left out: {reason}", file=sys.stderr)


def table_of(args: argparse.Namespace, name: str, releases: dict[str, Codec], key: Sequence[str] = KEY) -> Table:
    """The table of a command's rows, in --out_path; the main process writes it.

    Raises DiffoError for one among the pictures: what is written would be measured as well, the next time.
    """
    for folder in (args.data, getattr(args, "held_out", None)):
        if folder and args.out_path.resolve().is_relative_to(folder.resolve()):
            raise DiffoError(f"{args.out_path}: lies in the pictures' folder {folder}; choose another -o")
    told = about(args, releases)
    return Table(args.out_path, name, lambda: told, key, writes=is_main())


def measured(
    args: argparse.Namespace,
    name: str,
    releases: dict[str, Codec],
    variants: Sequence[Variant],
    baselines: Sequence[Baseline] = (),
    distances: Sequence[str] = (),
    by: str = "file",
) -> list[Row]:
    """--data coded by every variant, and by other codecs at the first release's bytes: rows in `<name>.csv`, their means.

    Args:
        by: a key of COUNTED, also for the bits per pixel of the means.
        distances: names of `measuring.patches.DISTANCES` that the means get as well.
    Raises:
        DiffoError: an option is wrong, before anything is coded; or as `Coding.code`.
    """
    evaluator, pictures = evaluator_of(args), named_photographs(args.data, args.limit)
    by_patches = distances_of(distances, args.device)
    first = [variant for variant in variants if variant.codec == variants[0].codec]
    points = [(variant.codec, variant.label) for variant in variants]
    points += [(baseline.name, at(variant.label, by)) for baseline in baselines for variant in first]
    with table_of(args, name, releases) as table:
        coding = Coding(table, pictures, args.out_path, evaluator)
        coding.code(variants)
        coding.match(baselines, first, by=by)
        means = [mean_of(coding.rows(*point), evaluator.names) for point in points]
        if by == "payload":
            means = [mean | {"bpp": payload_bpp(coding.rows(*p))} for mean, p in zip(means, points, strict=True)]
        if is_main():
            decoded = [[coding.decoded(*point, picture) for picture in pictures] for point in points]
            add_distances(means, decoded, list(pictures.values()), by_patches)
    return means


def fill(table: Table, jobs: Sequence[Callable[[], list[Row]]], told: str) -> None:
    """Do the jobs, on all ranks in turn, and add the rows that each gives to the one table."""
    count = world_size()
    gather_objects([])  # every rank has seen which files are there, and so has the same jobs, before one writes
    with tqdm(total=len(jobs), desc=told, unit="picture", disable=not (jobs and is_main())) as bar:
        for first in range(0, len(jobs), count):
            mine = jobs[first + rank()]() if first + rank() < len(jobs) else []
            for row in chain(*gather_objects(mine)):
                table.add(row)
            bar.update(min(count, len(jobs) - first))


class Coding:
    """The pictures of one command: what has been coded of them stands in its table, and is not coded again.

    A row stands as long as picture, weights, setting or bytes to be met, and its files, are the same; a score that
    it lacks is taken from the decoded picture.

    Args:
        pictures: paths by name. folder: for `files` and `decoded`.
    """

    def __init__(self, table: Table, pictures: dict[str, Path], folder: Path, evaluator: Evaluator):
        self.table, self.pictures, self.folder, self.evaluator = table, pictures, folder, evaluator
        self._checks = {name: checksum(path) for name, path in pictures.items()}

    def code(self, variants: Sequence[Variant]) -> None:
        """Every picture by every variant.

        Raises:
            PictureError: a picture cannot be read. BudgetError: one has no file within --bpp. DiffoError: a file cannot be
            written.
        """
        for codec in dict.fromkeys(variant.codec for variant in variants):
            todo = {
                name: [
                    v for v in variants if v.codec == codec and not self._stands(v.codec, v.label, name, v.made_from)
                ]
                for name in self.pictures
            }
            self._fill(codec, self._code_picture, todo)

    def match(
        self, baselines: Iterable[Baseline], variants: Sequence[Variant], made_from: str = "", by: str = "file"
    ) -> None:
        """Every picture by every other codec within the bytes that each variant took for it; errors as `code`.

        Args:
            made_from: what else decides the rows, for instance the weights of a codec that has some.
            by: a key of COUNTED.
        """
        for baseline in baselines:
            todo = {}
            for name in self.pictures:
                sizes = {at(v.label, by): self.table.get(v.codec, v.label, name)["bytes"] for v in variants}
                told = f"{made_from}{'payload ' if by == 'payload' else ''}within"
                goals = [(label, size, f"{told} {size} bytes") for label, size in sizes.items()]
                todo[name] = [goal for goal in goals if not self._stands(baseline.name, goal[0], name, goal[2])]
            self._fill(
                baseline.label, lambda name, todo, codec=baseline: self._match_picture(codec, name, todo, by), todo
            )

    def rows(self, codec: str, label: str) -> list[Row]:
        """The rows of one codec and label, one for each picture."""
        return [self.table.get(codec, label, name) for name in self.pictures]

    def _fill(self, told: str, work: Callable[[str, list], list[Row]], todo: dict[str, list]) -> None:
        fill(self.table, [lambda name=name: work(name, todo[name]) for name in todo if todo[name]], told)

    def _code_picture(self, name: str, variants: list[Variant]) -> list[Row]:
        image, rows = read_image(self.pictures[name]), []
        analysed = cache(lambda model, scale: model.analyse(image, scale))
        for v in variants:
            if self._stands(v.codec, v.label, name, v.made_from, scored=False):
                rows.append(self._scored(self.table.get(v.codec, v.label, name), image))
                continue
            try:
                data = v.file(partial(analysed, v.model))
            except BudgetError as error:
                raise BudgetError(f"{name}, --bpp {v.bpp:g}: {error}") from error
            decoded = v.model.decode(data, v.sampling)
            row = self._row(v.codec, v.label, name, image, v.made_from, data=data, suffix=STREAM)
            scale = unpack(data).scale / WHOLE
            setting = v.setting + (f", scale {scale:g}" if scale < 1 else "")
            row |= {"payload_bytes": len(data), "scale": scale, "setting": setting, "eta": decoded.eta}
            rows.append(self._scored(row, image, decoded.image))
        return rows

    def _match_picture(self, baseline: Baseline, name: str, goals: list[tuple[str, int, str]], by: str) -> list[Row]:
        image, rows = read_image(self.pictures[name]), []
        for label, size, made_from in goals:
            if self._stands(baseline.name, label, name, made_from, scored=False):
                rows.append(self._scored(self.table.get(baseline.name, label, name), image))
            elif coded := baseline.fit(image, size, payload=by == "payload"):
                made = {"data": coded.data, "suffix": baseline.suffix}
                row = self._row(baseline.name, label, name, image, made_from, **made)
                row |= {"payload_bytes": coded.payload, "scale": coded.scale, "setting": coded.setting}
                rows.append(self._scored(row, image, coded.decoded))
            else:
                smallest = baseline.smallest(image)
                size = smallest.payload if by == "payload" else len(smallest.data)
                floor = {"bytes": None, "floor_bytes": size}
                rows.append(self._row(baseline.name, label, name, image, made_from) | floor)
        return rows

    def _row(
        self, codec: str, label: str, name: str, image: Tensor, made_from: str, data: bytes = b"", suffix: str = ""
    ) -> Row:
        """What any codec's row says of a picture, and of its file, which is written."""
        height, width = image.shape[1:]
        row: Row = dict(zip(KEY, (codec, label, name), strict=True))
        row |= {"width": width, "height": height, "made_from": f"{made_from}, picture {self._checks[name]}"}
        if data:
            path = self.folder / "files" / codec / label / f"{Path(name).with_suffix('')}{suffix}"
            make_folder(path.parent)
            atomic_write(path, data)
            row |= {"bytes": len(data), "bpp": bpp(len(data), height, width)}
        return row

    def _scored(self, row: Row, image: Tensor, decoded: Tensor | None = None) -> Row:
        """The row with its scores; the decoded picture, where it is given, is written, else it is read."""
        path = self.decoded(*(row[name] for name in KEY))
        if decoded is None:
            decoded = read_image(path)
        else:
            make_folder(path.parent)
            write_image(path, decoded)
        return row | self.evaluator(image, decoded)

    def _stands(self, codec: str, label: str, name: str, made_from: str, scored: bool = True) -> bool:
        """Whether the table has this row, made of the same; `scored`: and all scores are in it."""
        row = self.table.get(codec, label, name)
        if row is None or row["made_from"] != f"{made_from}, picture {self._checks[name]}":
            return False
        if row["bytes"] is None:
            return True
        has_scores = not scored or all(score in row for score in self.evaluator.names)
        return has_scores and self.decoded(codec, label, name).is_file()

    def decoded(self, codec: str, label: str, name: str) -> Path:
        """Where the decoded picture is."""
        return self.folder / "decoded" / codec / label / f"{Path(name).with_suffix('')}.png"


def at(label: str, by: str = "file") -> str:
    """The label of another codec's rows that were matched to those of `label`, by a key of COUNTED."""
    return f"at {label}" + (" by payload" if by == "payload" else "")


def payload_bpp(rows: Sequence[Row]) -> float | None:
    """Mean bits per pixel of files without their containers; None where a picture has no file."""
    if any(row["bytes"] is None for row in rows):
        return None
    return fmean(bpp(row["payload_bytes"], row["height"], row["width"]) for row in rows)


def at_quality(name: str, model: Codec, quality: float) -> float:
    """The quality, where a release has it. Raises DiffoError for one above 0 of the base alone."""
    if quality and not model.has_levels:
        raise DiffoError(f"--quality {quality:g}: {name} codes the base alone, which is quality 0")
    return quality


def curve_of(name: str, model: Codec, args: argparse.Namespace) -> list[Variant]:
    """A release at --bpp, or else at all those --qualities that it has.

    Raises:
        DiffoError: it has none of them.
    """
    if args.bpp:
        return [Variant(name, f"{bpp:g}bpp", model, bpp=bpp) for bpp in dict.fromkeys(args.bpp)]
    has = [quality for quality in dict.fromkeys(args.qualities) if quality == 0 or model.has_levels]
    if not has:
        raise DiffoError(f"{name}: this release codes the base alone: add 0 to --qualities, or leave it out")
    return [Variant(name, f"{quality:g}", model, quality) for quality in has]
