"""Several threads that work through one list, each on other items: while one waits for the disk, others compute."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Lock
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
        for result in work(shared):
            results.put(result)

    with ThreadPoolExecutor(lanes, thread_name_prefix="lane") as pool:  # which waits for what is under way
        try:
            for _ in range(lanes):
                pool.submit(lane).add_done_callback(results.put)
            working = lanes
            while working:
                result = results.get()
                if isinstance(result, Future):
                    result.result()  # raises what ended the lane
                    working -= 1
                else:
                    take(result)
        finally:
            shared.closed = True
