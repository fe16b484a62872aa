"""Random orders as pure functions of numbers.

Orders come from sorting hashes (splitmix64, Steele et al. 2014) and not from a library's random
generator, whose streams may change between versions: a run resumed after an upgrade must still see
the rows in the order it began with.
"""

from typing import Any

import numpy as np

_Array = np.ndarray[Any, np.dtype[Any]]


def mix(values: _Array, *keys: int) -> _Array:
    """(N,) uint64 hashes of `values`, different for every sequence of keys."""
    with np.errstate(over="ignore"):
        state = values.astype(np.uint64)
        for key in (*keys, 0):
            state = state + np.uint64(key % 2**64) * np.uint64(0xD1342543DE82EF95)
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def hash_order(count: int, *keys: int) -> _Array:
    """(count,) The numbers 0 .. count-1 in a random order decided by the keys.

    >>> hash_order(5, 7).tolist() == hash_order(5, 7).tolist()
    True
    """
    order: _Array = np.argsort(mix(np.arange(count, dtype=np.uint64), *keys), kind="stable")
    return order
