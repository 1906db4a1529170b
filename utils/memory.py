"""What glibc's allocator does with large blocks of memory that were freed."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # glibc's malloc.h
_LARGE = 32 << 20  # bytes from which blocks are mapped, once the allocator has seen large ones
_NEVER = 2**31 - 1


def keep_freed_memory(kept: bool = True) -> None:
    """Whether freed memory stays with the process. Nothing where the C library is another one.

    Left to itself, glibc maps large blocks and returns them at every use: the system clears their pages again, which
    costs a network half as much as its arithmetic. Kept, memory that was used once is not given back.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    mallopt = library.mallopt
    mallopt(_MMAP_MAX, 0 if kept else 1 << 16)
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_TRIM_THRESHOLD, _NEVER if kept else 2 * _LARGE)
    if not kept:
        library.malloc_trim(0)  # what was kept would go on being used instead of mapped


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Inside it, a process that keeps freed memory gives it back."""
    keep_freed_memory(False)
    try:
        yield
    finally:
        keep_freed_memory()
