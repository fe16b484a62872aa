"""When memory that was freed goes back to the system, where the C library keeps it.

glibc keeps what a process frees for later use. Batches of another length every step leave holes
that the next step does not fit into, and the resident memory of a training on the CPU grows beyond
what its tensors need (`scripts/soak_memory.py` says whether it does). `malloc_trim` gives whole
free pages back (glibc, man 3 malloc_trim); it moves nothing and changes no value. Other C libraries
(macOS, Windows, musl) have no such call and need none.

A page that went back costs time when it is wanted again: the system hands it out zeroed. Steps want
about the same pages, so between steps they stay (`keep_freed_pages` for what glibc would give back
by itself in the middle of a step) for as long as the holes they leave cost little: until the
process holds an eighth more than the largest step took of those that began without any
(`FreedPages`).

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
from typing import Any

import psutil
import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_HELD_OF_NEEDED = 1.125
# A step of one length needs some thirty; layers share them.
_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


def keep_few_shapes() -> None:
    """Bound what this process keeps compiled for shapes seen before.

    Both caches read their size from the environment when a matrix is first multiplied, so this
    comes before; what the user has set stands. It changes no value.
    """
    for name, count in _SHAPES.items():
        os.environ.setdefault(name, count)


def keep_freed_pages() -> bool:
    """Let this process keep what it frees until `give_back_free_memory` is called.

    By itself glibc gives the top of its heap back whenever 64 MiB lie free there, which a step does
    over and over (man 3 mallopt: M_TRIM_THRESHOLD). Larger pieces than 32 MiB, the most that
    M_MMAP_THRESHOLD takes, always go back as they are freed.

    Returns:
        Whether this C library can.
    """
    mallopt = _glibc("mallopt", ctypes.c_int, ctypes.c_int)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 * 2**20) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


class FreedPages:
    """Gives freed pages back before a step where they have come to be too many.

    Args:
        device: Of the steps; all but a CPU have allocators of their own, and nothing is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cpu = device.type == "cpu"
        self._most = 0  # resident bytes after a step that began without holes
        self._without_holes = False

    def before_step(self) -> None:
        """Give pages back if more are held than a step has been seen to need."""
        if self._is_cpu and _resident_bytes() > _HELD_OF_NEEDED * self._most:
            self.give_back()

    def after_step(self) -> None:
        """Learn what a step needs: what it freed is still held."""
        if self._is_cpu and self._without_holes:
            self._most = max(self._most, _resident_bytes())
        self._without_holes = False

    def give_back(self) -> None:
        """Give pages back now: before the first step, or something else than a step comes next."""
        if self._is_cpu:
            give_back_free_memory()
        self._without_holes = True


def _resident_bytes() -> int:
    resident: int = psutil.Process().memory_info().rss
    return resident


def give_back_free_memory() -> bool:
    """Return the process's free pages to the system.

    Returns:
        Whether this C library can.
    """
    trim = _glibc("malloc_trim", ctypes.c_size_t)
    if trim is None:
        return False
    trim(0)
    return True


@functools.cache
def _glibc(name: str, *takes: Any) -> Callable[..., int] | None:
    """A function of glibc that gives an int; None where there is another C library."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):  # musl
        return None
    function = getattr(library, name)
    function.argtypes, function.restype = takes, ctypes.c_int
    found: Callable[..., int] = function
    return found
