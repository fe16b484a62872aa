"""Figures of classifiers and regressions, from counts.

Definitions are the field's own, as scikit-learn's documentation gives them; where a ratio has
nothing below its line (no row of a class, or none predicted) it is 0. Micro counts all decisions
together, macro takes the mean over classes, weighted by their rows.

N rows, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class ClassCounts:
    """Decisions about every class.

    Attributes:
        right: (K,) Rows rightly given the class.
        predicted: (K,) Rows given it.
        rows: (K,) Rows that are of it.
    """

    right: Array
    predicted: Array
    rows: Array

    @property
    def precision(self) -> Array:
        """(K,) Share of what was given a class that is of it."""
        return _ratio(self.right, self.predicted)

    @property
    def recall(self) -> Array:
        """(K,) Share of what is of a class that was given it."""
        return _ratio(self.right, self.rows)

    @property
    def f1(self) -> Array:
        """(K,) Harmonic mean of both."""
        return _ratio(2 * self.right, self.predicted + self.rows)

    def averages(self) -> dict[str, float]:
        """Micro F1, macro precision, recall and F1, weighted F1."""
        return {
            "macro_precision": float(self.precision.mean()),
            "macro_recall": float(self.recall.mean()),
            "macro_f1": float(self.f1.mean()),
            "micro_f1": float(_ratio(2 * self.right.sum(), self.predicted.sum() + self.rows.sum())),
            "weighted_f1": float(_ratio((self.f1 * self.rows).sum(), self.rows.sum())),
        }


def confusion_matrix(classes: Array, predicted: Array, count: int) -> Array:
    """(K, K) rows by their class (down) and the class they were given (across).

    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    flat = np.bincount(classes * count + predicted, minlength=count * count)
    return flat.reshape(count, count)


def counts_of_matrix(matrix: Array) -> ClassCounts:
    """Counts of a problem with one class a row."""
    return ClassCounts(np.diag(matrix), matrix.sum(0), matrix.sum(1))


def counts_of_sets(truth: Array, predicted: Array) -> ClassCounts:
    """Counts of a problem with any number of classes a row: (N, K) of booleans each."""
    return ClassCounts((truth & predicted).sum(0), predicted.sum(0), truth.sum(0))


def matthews(matrix: Array) -> float:
    """Matthews' correlation for any number of classes (Gorodkin, 2004); 0 where it is undefined.

    >>> round(matthews(np.array([[3, 1], [1, 3]])), 3)
    0.5
    """
    rows, given = matrix.sum(1).astype(float), matrix.sum(0).astype(float)
    total = float(matrix.sum())
    above = float(np.trace(matrix)) * total - float(rows @ given)
    below = np.sqrt((total**2 - given @ given) * (total**2 - rows @ rows))
    return float(above / below) if below else 0.0


def pearson(x: Array, y: Array) -> float:
    """Pearson's correlation; 0 where one of the two is constant."""
    x, y = x - x.mean(), y - y.mean()
    below = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / below) if below else 0.0


def spearman(x: Array, y: Array) -> float:
    """Pearson's correlation of the ranks, ties at their mean.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
    1.0
    """
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: Array = last - (counts - 1) / 2.0
    return means[inverse]


def _ratio(above: Any, below: Any) -> Any:
    above, below = np.asarray(above, float), np.asarray(below, float)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def class_report(names: Sequence[str], counts: ClassCounts) -> str:
    """Precision, recall, F1 and rows of every class, and their averages, as lines of text."""
    width = max(14, *(len(name) for name in names))
    lines = [f"{'':<{width}}  precision  recall      f1    rows"]
    table = zip(names, counts.precision, counts.recall, counts.f1, counts.rows, strict=True)
    lines += [
        f"{n:<{width}}  {p:>9.4f}  {r:>6.4f}  {f:>6.4f}  {int(c):>6}" for n, p, r, f, c in table
    ]
    means = counts.averages()
    lines += [
        "",
        f"{'macro average':<{width}}  {means['macro_precision']:>9.4f}  "
        f"{means['macro_recall']:>6.4f}  {means['macro_f1']:>6.4f}  {int(counts.rows.sum()):>6}",
        f"{'micro F1':<{width}}  {'':>9}  {'':>6}  {means['micro_f1']:>6.4f}",
        f"{'weighted F1':<{width}}  {'':>9}  {'':>6}  {means['weighted_f1']:>6.4f}",
    ]
    return "\n".join(lines)
