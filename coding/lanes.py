"""Several threads that work through one list, each on other items: while one waits for the disk, others compute."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


class _Shared(Iterator[Item]):
    """Items for whichever thread asks next; none any more once `stopped` says so."""

    def __init__(self, items: Sequence[Item], stopped: Callable[[], bool]):
        self._items, self._stopped, self._lock = iter(items), stopped, Lock()
        self.closed = False

    def __next__(self) -> Item:
        with self._lock:
            if self.closed or self._stopped():
                raise StopIteration
            return next(self._items)


class _Ended:
    """The last that a lane tells: the error that ended it, if one did."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


def in_lanes(
    work: Callable[[Iterator[Item]], Iterable[Result]],
    items: Sequence[Item],
    lanes: int,
    take: Callable[[Result], None],
    stopped: Callable[[], bool],
) -> None:
    """Call `take`, in this thread, with all that `work` gives for the items, as it comes; one lane is this thread.

    Args:
        work: called in every lane with an iterator; each item comes to one lane.
        stopped: whether to begin no more items; what is under way is finished, and taken.
    Raises:
        what `work` and `take` raise, once what is under way has ended.
    """
    shared = _Shared(items, stopped)
    if lanes == 1:
        for result in work(shared):
            take(result)
        return
    results: SimpleQueue = SimpleQueue()

    def lane() -> None:
        try:
            for result in work(shared):
                results.put(result)
            results.put(_Ended())
        except BaseException as error:
            results.put(_Ended(error))

    threads = [Thread(target=lane, name=f"lane {number}") for number in range(lanes)]
    try:
        for thread in threads:
            thread.start()
        working = lanes
        while working:
            result = results.get()
            if not isinstance(result, _Ended):
                take(result)
            elif result.error:
                raise result.error
            else:
                working -= 1
    finally:
        shared.closed = True
        for thread in threads:
            if thread.ident:
                thread.join()
