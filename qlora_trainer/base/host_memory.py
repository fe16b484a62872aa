"""Memory of the host that was freed: kept within a step, given back to the system after it.

glibc serves a large block by a mapping of its own and unmaps it when it is freed, so every tensor
above 128 KiB that a step makes has all its pages mapped and cleared by the kernel: for a 512 x 1536
activation 10 to 30 times as long as writing it. `keep_free_memory` makes glibc take large blocks
from its heap and leave them there (man 3 mallopt), as the caching allocator does on CUDA.

What stays must go back in the end: batches of another length every step leave holes that the next
step does not fit into, and the resident memory of a training on the CPU grows to several times what
its tensors need (the quickstart: 2.8 GiB after eight steps instead of 0.9). `malloc_trim` gives
whole free pages back (man 3 malloc_trim); it moves nothing. Neither changes a value. Other C
libraries (macOS, Windows, musl) have no such calls.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_KEPT_BYTES = 2**30  # blocks below come from the heap, whose free end may be so large
_GROWTH_BYTES = 2**25  # the heap grows by at least so much


def keep_free_memory() -> bool:
    """Let this process reuse the pages of freed tensors instead of asking for new ones.

    It lasts as long as the process and changes no value. `give_back_free_memory` still returns
    what is free.

    Returns:
        Whether this C library can.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = (
        (_M_MMAP_THRESHOLD, _KEPT_BYTES),
        (_M_TRIM_THRESHOLD, _KEPT_BYTES),
        (_M_TOP_PAD, _GROWTH_BYTES),
    )
    return all(mallopt(option, value) == 1 for option, value in wanted)


def give_back_free_memory() -> bool:
    """Return the process's free pages to the system.

    Returns:
        Whether this C library can.
    """
    trim = _malloc_trim()
    if trim is None:
        return False
    trim(0)
    return True


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
