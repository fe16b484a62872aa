"""The report's two pictures as PNG files, for where a page cannot go."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.memory.picture_data import (
    COLOURS,
    OTHER,
    TINTS,
    one_step,
    parts_of,
    stretches,
    thinned,
)

_GIB = 2**30


def draw_bars(
    configurations: Mapping[str, Foresight],
    file: Path,
    *,
    title: str,
    measured_bytes: Mapping[str, int] | None = None,
) -> None:
    """Stacked bars against the card's line.

    Args:
        configurations: Name -> prediction, from top to bottom.
        file: The PNG.
        title: Heading.
        measured_bytes: Name -> measured reserved bytes, where known.
    """
    figure = Figure(figsize=(10, 1.9 + 0.55 * len(configurations)), layout="constrained")
    axes = figure.subplots()
    named: set[str] = set()
    for row, found in enumerate(configurations.values()):
        left = 0.0
        for part, size in parts_of(found).items():
            label = None if part in named else part
            named.add(part)
            width = size / _GIB
            axes.barh(row, width, left=left, color=COLOURS.get(part, OTHER), label=label)
            left += width
        capacity = found.capacity_bytes / _GIB
        axes.plot([capacity, capacity], [row - 0.48, row + 0.48], color="#a4161a", linewidth=2.5)
    for name, size in (measured_bytes or {}).items():
        at = (size + configurations[name].context_bytes) / _GIB
        axes.plot(at, list(configurations).index(name), "o", color="black", markeredgecolor="white")
    axes.set_yticks(range(len(configurations)), list(configurations))
    axes.invert_yaxis()
    axes.set_xlabel("GiB; red: what the card has for the run")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    figure.savefig(file, dpi=130)


def draw_timeline(found: Foresight, file: Path, *, title: str) -> None:
    """Allocated and reserved memory during one training step, its phases shaded.

    Args:
        found: A prediction made with its timeline.
        file: The PNG.
        title: Heading.
    """
    points = thinned(one_step(found), 1500)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    named: set[str] = set()
    for phase, start, stop in stretches(points):
        label = None if phase in named else phase
        named.add(phase)
        axes.axvspan(start, stop, color=TINTS.get(phase, "#f2f2f2"), label=label, linewidth=0)
    axes.plot([p[1] / _GIB for p in points], "--", color="#777", linewidth=1.2, label="reserved")
    axes.plot([p[0] / _GIB for p in points], color="#1d4e79", linewidth=1.2, label="allocated")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.set_xticks([])
    axes.set_ylabel("GiB")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    figure.savefig(file, dpi=130)
