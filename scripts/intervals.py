"""95 % intervals for shares of right answers, and for the gain between two models on the same rows.

One share: Wilson's score interval, which stays inside 0..1 and holds its level at small counts.
The gain: rows answered by both models are pairs, and only the rows where the two differ carry
information. The interval is Newcombe's (1998, method 10): the two Wilson intervals joined, with the
correlation of the pairs. Standard library only.
"""

from __future__ import annotations

import math
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
