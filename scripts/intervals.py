"""95 % intervals for shares of right answers, and for the gain between two models on the same rows.

One share: Wilson's score interval, which stays inside 0..1 and holds its level at small counts.
The gain: rows answered by both models are pairs, and only the rows where the two differ carry
information. The interval is Newcombe's (1998, method 10): the two Wilson intervals joined, with the
correlation of the pairs. Also the mean of a few paired differences, by Student's interval and by
Fisher's exact test of sign flips. Standard library only.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval."""

    estimate: float
    low: float
    high: float

    def in_points(self) -> str:
        """As percentage points.

        >>> Interval(0.25, 0.2, 0.305).in_points()
        '25.0 (20.0 to 30.5)'
        """
        return f"{100 * self.estimate:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def share_interval(right: int, rows: int) -> Interval:
    """Wilson's interval for `right` of `rows`."""
    if not 0 <= right <= rows or rows == 0:
        raise ValueError(f"{right} of {rows} is no share")
    share = right / rows
    spread = Z_95**2 / rows
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / rows + spread / (4 * rows)) / (1 + spread)
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == rows else centre + half
    return Interval(share, low, high)


def gain_interval(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """Newcombe's interval for share(after) - share(before), answers paired by row."""
    if len(before) != len(after):
        raise ValueError(f"{len(before)} answers before and {len(after)} after are no pairs")
    rows = len(before)
    old = share_interval(sum(before), rows)
    new = share_interval(sum(after), rows)
    correlation = _correlation(before, after)
    gain = new.estimate - old.estimate
    below = _joined(new.estimate - new.low, old.high - old.estimate, correlation)
    above = _joined(new.high - new.estimate, old.estimate - old.low, correlation)
    return Interval(gain, gain - below, gain + above)


def _joined(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))


def _correlation(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Newcombe's phi of the 2 x 2 table; a positive one is drawn towards 0 by half a row."""
    rows = len(before)
    pairs = list(zip(before, after, strict=True))
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    product = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    if product == 0:
        return 0.0
    surplus = both * neither - lost * won
    corrected = max(surplus - rows / 2, 0.0) if surplus > 0 else float(surplus)
    return corrected / math.sqrt(product)


# Student's t, 97.5 % quantile, by degrees of freedom (two-sided 95 %).
_T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def mean_interval(differences: Sequence[float]) -> Interval:
    """Student's interval for the mean of 2 to 10 paired differences.

    >>> found = mean_interval([0.1, -0.1, 0.2, 0.0, -0.2])
    >>> round(found.estimate, 4), round(found.low, 4), round(found.high, 4)
    (0.0, -0.1963, 0.1963)
    """
    count = len(differences)
    if not 2 <= count <= len(_T_95) + 1:
        raise ValueError(f"{count} pairs: the table holds 2 to {len(_T_95) + 1}")
    half = _T_95[count - 2] * statistics.stdev(differences) / math.sqrt(count)
    mean = statistics.fmean(differences)
    return Interval(mean, mean - half, mean + half)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Share of all sign flips of the pairs whose mean is at least as far from 0: an exact test.

    >>> sign_flip_p([1.0, 1.0, 1.0]), sign_flip_p([1.0, -1.0])
    (0.25, 1.0)
    """
    seen = abs(math.fsum(differences)) * (1 - 1e-12)
    flips = list(itertools.product((1, -1), repeat=len(differences)))
    as_far = (
        abs(math.fsum(s * d for s, d in zip(flip, differences, strict=True))) for flip in flips
    )
    return sum(total >= seen for total in as_far) / len(flips)
