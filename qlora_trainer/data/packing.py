"""Packing examples into rows of at most `capacity` tokens, none of them split.

Best-fit decreasing: the longest first, each into the fullest row that still takes it (at most
11/9 of the fewest rows possible, plus a few; Johnson 1974). The remaining capacities that occur are
the bits of one integer, so "the smallest remaining capacity of at least n" is a shift and the
lowest bit: a million examples take seconds.

The result depends on the lengths alone, so examples of equal length may trade places: that is how
`batches.py` packs anew every epoch and still has the same number of rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray[Any, Any], capacity: int) -> list[list[int]]:
    """Group indices so that the lengths of each group sum to at most `capacity`.

    Raises:
        ValueError: A length is not between 1 and `capacity`.

    >>> pack([3, 5, 2, 6, 1], 8)
    [[3, 2], [1, 0], [4]]
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and not 1 <= int(sizes.min()) <= int(sizes.max()) <= capacity:
        raise ValueError(f"lengths must be between 1 and the capacity {capacity}")
    groups: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # remaining -> group numbers
    present = 0  # bit n: a group with n tokens of room exists
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        fitting = present >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            group = with_room[room].pop()
            if not with_room[room]:
                present ^= 1 << room
        else:
            room, group = capacity, len(groups)
            groups.append([])
        groups[group].append(index)
        left = room - size
        if left:
            with_room[left].append(group)
            present |= 1 << left
    return groups
