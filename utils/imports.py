"""What an import must not bring with it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def absent(*names: str) -> Iterator[None]:
    """Inside it, importing these modules fails with ImportError, as if they were not installed; afterwards it works.

    For libraries that try an optional import at a cost of seconds. Modules that are imported already stay.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
