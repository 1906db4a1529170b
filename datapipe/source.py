"""The interface of every source: pictures by index, and a record of those that cannot be read."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from utils import distributed
from utils.errors import ConfigError, PictureError


class Source(ABC):
    """Pictures by index, 0 <= index < len(source), and a record of those that cannot be read.

    Attributes:
        name: where the pictures are, for messages.
        left_out: what else is there, as `utils.files.tell_left_out` says it.
    """

    def __init__(self, name: str, count: int, left_out: str = ""):
        if not count:
            raise ConfigError(f"{name}: no pictures there{left_out}")
        self.name, self.left_out = name, left_out
        # Shared with the processes that decode: they mark, the main process tells.
        self._unreadable = torch.zeros(count, dtype=torch.bool).share_memory_()
        self._told: set[int] = set()

    def __len__(self) -> int:
        return len(self._unreadable)

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """The picture as uint8 (3, H, W), RGB. Raises PictureError, which names it, if it cannot be read."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Names that identify the set and its order, independent of the mount point."""

    def digest(self) -> str:
        """SHA-256 of the names, in hexadecimal digits: alike where index i is the same picture."""
        digest = hashlib.sha256()
        for name in self.names():
            digest.update(name.encode(errors="surrogateescape") + b"\0")
        return digest.hexdigest()

    def mark_unreadable(self, index: int) -> None:
        self._unreadable[index] = True

    def unreadable_lines(self) -> list[str]:
        """Messages about pictures found unreadable by any rank: each is named once, and a last line counts them all.

        A collective: all ranks call it. Empty on all ranks but the main one, and where there is nothing new.
        """
        found = distributed.gather_objects(torch.nonzero(self._unreadable).flatten().tolist())
        new = sorted(set().union(*found) - self._told)
        self._told.update(new)
        if not new or not distributed.is_main():
            return []
        counted = f"unreadable so far: {len(self._told)} of {len(self)} pictures; the next in order replaces each"
        return [*(f"skipped: {self._reason(index)}" for index in new), counted]

    def _reason(self, index: int) -> str:
        """Why a picture cannot be read, found out anew: the process that first met it has no way to tell."""
        try:
            self.read(index)
        except PictureError as error:
            return str(error)
        return f"{self.name}: picture {index} could not be read at first, and can be now"
