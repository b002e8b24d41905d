"""Memory of a CPU's tensors: given back when nothing needs it, so that a peak is what was alive at once.

glibc keeps freed blocks of up to 32 MiB in its heap, where aligned ones as large hardly ever fit again:
passes of some models took 1.7 times what was alive. Large blocks come from the system one by one here, in
pages of 2 MiB where it has them: small ones would cost more time than what is done with them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

# Blocks from here on are the system's, each by itself; what is free at the heap's end may be as much as this.
LARGE_BLOCK, FREE_AT_END = 4 * 2**20, 64 * 2**20
# As malloc.h names them, and what torch reads when it first allocates.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
# What a user sets for glibc stays.
_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def bound_heap() -> None:
    """Have this process's large blocks given back at once; to be called before torch is imported.

    Without glibc nothing is done.
    """
    os.environ.setdefault(_LARGE_PAGES, "1")
    mallopt = _glibc("mallopt")
    if mallopt is None or any(name in os.environ for name in _OWN_SETTINGS):
        return
    mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
    mallopt(_M_TRIM_THRESHOLD, FREE_AT_END)


def give_back() -> None:
    """Give the heap's free pages back to the system. Without glibc nothing is done."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


@functools.cache
def _glibc(name: str) -> Any:
    """A function of glibc's; None where there is another library."""
    try:
        found = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return getattr(found, name, None) if hasattr(found, "gnu_get_libc_version") else None
