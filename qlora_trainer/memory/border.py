"""The search behind every border: of `profile --fit`, of what fits where, of `activations: auto`.

Only what was asked counts: a guess says where to look next, never what the answer is.
"""

from collections.abc import Callable


def last_that_fits(
    count: int, fits: Callable[[int], bool], guess: Callable[[int, int], int]
) -> int:
    """The last of the indices 0 ... count - 1 that fits; -1 when not even the first does.

    It and the next one have both been asked.

    Args:
        count: Indices there are, of ascending need.
        fits: Asked once of an index.
        guess: (last known to fit or -1, first known not to or `count`) -> where to look next;
            decides how often `fits` is asked, never what is found.

    >>> last_that_fits(100, lambda index: index * index < 50, lambda low, high: (low + high) // 2)
    7
    """
    low, high = -1, count
    while high - low > 1:
        index = min(max(guess(low, high), low + 1), high - 1)
        if fits(index):
            low = index
        else:
            high = index
    return low
