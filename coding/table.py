"""The one table on disk: rows by key, merged with those that its folder has, written as CSV and JSON as it grows."""

import csv
import io
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from coding.report import Row, columns_of, intervals_of, mean_row
from utils.errors import DiffoError
from utils.files import atomic_write, held, made_folder

PAUSE = 20  # between two times that the files are written, in durations of writing them: 5 % of the time at most


class Table:
    """Rows by key, in `<name>.csv` and in `<name>.json`, which also says how they were made.

    Inside `with`, no other process has the folder. Rows of earlier runs stay; one of the same key takes the place of
    the old one. However the block ends, an interrupt included, all rows are on the disk then.

    Args:
        about: how rows of this run are made, asked for whenever they are written.
        key: the columns that name a row. writes: False for the ranks that only compute: they read, and hold nothing.
    Raises:
        DiffoError: on entering, the folder is another process's, or a file of this name is no such table.
    """

    def __init__(
        self, folder: Path, name: str, about: Callable[[], dict], key: Sequence[str] = ("picture",), writes: bool = True
    ):
        self.csv, self.json = folder / f"{name}.csv", folder / f"{name}.json"
        self.about, self.key, self.writes = about, key, writes
        self._rows: dict[tuple, Row] = {}
        self._earlier: list[dict] = []  # how rows of earlier runs were made
        self._kept: set[tuple] = set()  # their keys
        self._due = 0.0

    def __enter__(self) -> "Table":
        with ExitStack() as opened:
            if self.writes:
                opened.enter_context(held(opened.enter_context(made_folder(self.json.parent))))
            self._read()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_) -> None:
        with self._opened:
            self.write(intervals=True)

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order in which their keys came."""
        return list(self._rows.values())

    def get(self, *key: str) -> Row | None:
        """The row of a key, or None."""
        return self._rows.get(key)

    def add(self, row: Row) -> None:
        """Add a row, or replace the one of its key; on the disk within a moment."""
        key = tuple(row[name] for name in self.key)
        self._rows[key] = row
        self._kept.discard(key)
        if time.monotonic() > self._due:
            self.write()

    def arrange(self, names: Sequence[str]) -> None:
        """Put the rows of these names, of one column, in this order, behind all others."""
        for key in [(name,) for name in names if (name,) in self._rows]:
            self._rows[key] = self._rows.pop(key)

    def write(self, intervals: bool = False) -> None:
        """Write both files, unless there is nothing to write; means get their intervals at the end, which takes time."""
        if not (self.writes and self._rows):
            return
        began = time.monotonic()
        write_rows(self.rows, self.csv)
        content = {"about": self.about()}
        if self._kept:  # some rows are not of this run
            content["earlier"] = [about for about in self._earlier if about != content["about"]]
        if len(self.key) == 1:
            content["mean"] = mean_row(self.rows) | (intervals_of(self.rows) if intervals else {})
        write_json(content | {"pictures": self.rows}, self.json)
        now = time.monotonic()
        self._due = now + PAUSE * (now - began)

    def _read(self) -> None:
        """The rows that are there."""
        if not self.json.exists():
            if self.csv.exists():
                raise DiffoError(f"{self.csv}: there without {self.json.name}; move it away, or choose another -o")
            return
        try:
            content = json.loads(self.json.read_bytes())
            self._rows = {tuple(row[name] for name in self.key): row for row in content["pictures"]}
            self._earlier = [*content.get("earlier", []), content["about"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DiffoError(f"{self.json}: not a table of this command; move it away, or choose another -o") from error
        self._kept = set(self._rows)


def write_rows(rows: Sequence[Row], path: Path, columns: Sequence[str] | None = None) -> None:
    """The rows as CSV; without `columns`, those that any row fills."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns or columns_of(rows), restval="", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    atomic_write(path, text.getvalue().encode(errors="backslashreplace"))  # names of files need not be text


def write_json(content: dict, path: Path) -> None:
    """A mapping as JSON, which has no infinity: equal pictures have a PSNR of null."""
    plain = json.loads(json.dumps(content), parse_constant=lambda _: None)
    atomic_write(path, (json.dumps(plain, indent=1) + "\n").encode())
