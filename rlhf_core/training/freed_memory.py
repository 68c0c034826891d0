"""Freed memory that glibc keeps for the next step.

A step frees tensors of the same sizes that the next one allocates. By default glibc gives those
above 32 MB back to the system at once, and the next use of each page is a page fault. In float32
that is 6 % of a step of 0.5 B weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # parameters of mallopt in malloc.h
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}
# What glibc has after it has freed a large block.
DEFAULT = {MMAP_MAX: 2**16, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep freed memory in a `with` block, and give it back to the system afterwards.

    Nothing changes under another C library, or if the environment sets glibc's own options
    (MALLOC_MMAP_MAX_, GLIBC_TUNABLES and others).
    """
    libc = _libc()
    if libc is None:
        yield
        return
    _set(libc, KEEP)
    try:
        yield
    finally:
        _set(libc, DEFAULT)
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    chosen = any(x.startswith("MALLOC_") for x in os.environ) or "GLIBC_TUNABLES" in os.environ
    libc = None if chosen or os.name != "posix" else ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _set(libc: ctypes.CDLL, options: dict[int, int]) -> None:
    for name, value in options.items():
        libc.mallopt(name, value)
