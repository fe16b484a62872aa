"""What a picture of a prediction shows, page or PNG: the parts of a bar, the points of one step.

Each part and each phase has one colour wherever it is drawn.
"""

from collections.abc import Sequence

from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.memory.simulate import LiveTensor

COLOURS = {
    "base weights": "#33658a", "quantization state": "#86bbd8", "embeddings and heads": "#2f4858",
    "norms and other": "#9aa5b1", "adapters": "#f6ae2d", "gradients": "#f26419",
    "optimizer states": "#a23b72", "kept activations": "#6a994e", "recomputed layer": "#a7c957",
    "backward temporaries": "#bc4749", "dequantized weights": "#5e548e",
    "logits and loss": "#e07a5f", "workspaces": "#3d405b", "cached, not in use": "#dcdcdc",
    "CUDA context": "#b5b5b5", "paged states": "#d4a5c3",
    "evaluation": "#8d6a9f", "optimizer step": "#c77dbb",
}  # fmt: skip
OTHER = "#777777"
TINTS = {
    "load": "#e8edf2", "forward": "#e3f1e3", "backward": "#fde8d7", "optimizer step": "#f3dff0",
    "evaluation": "#e4e2f5",
}  # fmt: skip


def made_by(tensor: LiveTensor) -> str:
    """The line of code that made a tensor; the base is put in its place rather than made."""
    return "loading the base" if tensor.operator == "load" else tensor.where


def parts_of(found: Foresight) -> dict[str, int]:
    """What a bar is made of: components at the peak, the allocator's rest, the context."""
    order = list(COLOURS)
    parts = {  # in one order for all configurations, so that bars can be compared
        name: found.by_component[name]
        for name in sorted(
            found.by_component, key=lambda n: order.index(n) if n in order else len(order)
        )
    }
    rest = found.reserved_bytes - sum(parts.values())
    if rest > 0:
        parts["cached, not in use"] = rest
    parts["CUDA context"] = found.context_bytes
    if found.paged_on_card:
        parts["paged states"] = found.paged_bytes
    return {name: size for name, size in parts.items() if size > 0}


def one_step(found: Foresight) -> list[tuple[int, int, str]]:
    """(allocated, reserved, phase) during the last simulated training step, which is a whole one.

    Without an optimizer step in the timeline it is all of it.
    """
    points = list(found.timeline)
    ends = [
        i + 1
        for i, point in enumerate(points)
        if point[2] == "optimizer step"
        and (i + 1 == len(points) or points[i + 1][2] != "optimizer step")
    ]
    return points[ends[-2] : ends[-1]] if len(ends) > 1 else points


def thinned(points: Sequence[tuple[int, int, str]], most: int) -> list[tuple[int, int, str]]:
    """The highest point of each stretch, so that no peak is lost."""
    stretch = max(1, -(-len(points) // most))
    return [max(points[i : i + stretch]) for i in range(0, len(points), stretch)]


def stretches(points: Sequence[tuple[int, int, str]]) -> list[tuple[str, int, int]]:
    """(phase, first, stop) of each stretch of points in one phase."""
    found: list[tuple[str, int, int]] = []
    start = 0
    for i in range(1, len(points) + 1):
        if i == len(points) or points[i][2] != points[start][2]:
            found.append((points[start][2], start, i))
            start = i
    return found
