"""Results that are kept between calls: the few that were used last, by key."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

_holders: list[list] = []


class Kept:
    """At most `most` results, for any thread; the one that was used longest ago is forgotten. Copies of it start empty."""

    def __init__(self, most: int):
        self.most = most
        self._results: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = RLock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of a key, made by the first call."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
            else:
                self._results[key] = make()
                while len(self._results) > self.most:
                    self._results.popitem(last=False)
            found = self._results[key]
        for holder in _holders:
            holder.append(found)
        return found

    def __contains__(self, key: Hashable) -> bool:
        return key in self._results

    def clear(self) -> None:
        self._results.clear()

    def __len__(self) -> int:
        return len(self._results)

    def __reduce__(self):
        return Kept, (self.most,)


@contextmanager
def holding() -> Iterator[list]:
    """Inside it, all results that are asked for go into a list: whoever has that may rely on their memory."""
    holder: list = []
    _holders.append(holder)
    try:
        yield holder
    finally:
        _holders.remove(holder)
