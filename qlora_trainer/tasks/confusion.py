"""A confusion matrix scored and drawn: rows by their class down, by what they were given across."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qlora_trainer.tasks.class_metrics import class_report, counts_of_matrix, matthews
from qlora_trainer.tasks.task import Scores

_MOST_NUMBERED = 25  # classes whose cells still hold a number one can read


def score_matrix(matrix: "np.ndarray[Any, np.dtype[Any]]", names: Sequence[str]) -> Scores:
    """Figures of (K, K) counts, their table by class, and their picture."""
    counts = counts_of_matrix(matrix)
    return Scores(
        {**counts.averages(), "matthews": matthews(matrix)},
        class_report(names, counts),
        {"confusion.png": partial(draw_confusion, matrix, names)},
    )


def draw_confusion(
    matrix: "np.ndarray[Any, np.dtype[Any]]", names: Sequence[str], picture: Path
) -> None:
    """Draw (K, K) counts; colours are shares of the class, numbers are rows.

    A figure of its own, no pyplot: drawing must not touch the user's plots or need a display.
    """
    # Here, as matplotlib takes half a second that commands which draw nothing need not wait.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(names)
    side = min(16.0, 3.5 + 0.45 * count)
    figure = Figure(figsize=(side + 1, side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.046, label="share of the class")
    # parse_math=False: a label with dollar signs is a label, not a formula that may not parse
    short = [_short(name) for name in names]
    axes.set_xticks(range(count), short, rotation=60, ha="right", parse_math=False)
    axes.set_yticks(range(count), short, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if count <= _MOST_NUMBERED:
        for down, across in np.ndindex(count, count):
            colour = "white" if shares[down, across] > 0.5 else "black"
            number = str(int(matrix[down, across]))
            axes.text(across, down, number, ha="center", va="center", color=colour, fontsize=8)
    # Tight: the layout of square axes beside a colour bar leaves long labels out of the picture.
    figure.savefig(picture, bbox_inches="tight")


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:21]}..."
