"""Giving memory that was freed back to the system, where the C library keeps it.

glibc keeps what a process frees for later use. Batches of another length every step leave holes
that the next step does not fit into, and the resident memory of a training on the CPU grows to
several times what its tensors need (the quickstart: 2.8 GiB after eight steps instead of 0.9).
`malloc_trim` gives whole free pages back (glibc, man 3 malloc_trim); it moves nothing and changes
no value. Other C libraries (macOS, Windows, musl) have no such call and need none.

And oneDNN, which multiplies matrices on a CPU, keeps what it compiled for each shape, up to 1,024
matrices' worth in two caches (its own and torch's over it): of a model of 135M 17 MiB for each new
length of a batch, until 36 lengths are there. `keep_few_shapes` lowers both to what a few lengths
need.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Callable

# A step of one length needs some thirty; layers share them.
_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


def keep_few_shapes() -> None:
    """Bound what this process keeps compiled for shapes seen before.

    Both caches read their size from the environment when a matrix is first multiplied, so this
    comes before; what the user has set stands. It changes no value.
    """
    for name, count in _SHAPES.items():
        os.environ.setdefault(name, count)


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
