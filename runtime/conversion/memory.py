"""Giving freed memory back to the system, so that the peak is that of what is in use.

glibc keeps what was freed in its heap, and serves from it requests of up to 32 MB once blocks of that size were freed.
What outlives the temporaries of a conversion (compressed weights that wait for their shard) lies scattered among them
there. Measured before this module existed: the peak of Wanda on 32 blocks was 1.8 times that on 8.
"""

from __future__ import annotations

import ctypes
import functools

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# Larger than the temporaries of a selection (formats/selection.py), which are made over and over, smaller than weights
# that make a peak.
DIRECT_BYTES = 1 << 20


@functools.lru_cache(maxsize=1)
def _glibc() -> ctypes.CDLL | None:
    """None with another C library, or allocator, that lacks these functions."""
    try:
        library = ctypes.CDLL(None)
        return library if library.malloc_trim and library.mallopt else None
    except (OSError, AttributeError):
        return None


def keep_heap_small() -> None:
    """From now on, blocks of ``DIRECT_BYTES`` come from the system and go back to it when they are freed.

    For the rest of the process: it has no way back to the default, under which that size grows with what is freed.
    """
    if _glibc() is not None:
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            _glibc().mallopt(parameter, DIRECT_BYTES)


def release() -> None:
    """Return the free pages of the heap to the system."""
    if _glibc() is not None:
        _glibc().malloc_trim(0)
