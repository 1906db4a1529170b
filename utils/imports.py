"""Imports without other modules, or without warnings that no user can mend."""

import sys
import warnings
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


@contextmanager
def quiet() -> Iterator[None]:
    """Inside it, libraries may use what newer ones will drop (torch.jit.script, say): the versions here are pinned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision.models._utils")  # lpips' arguments
        yield
