"""The loss by step as a picture, the task's own metric below, from `metrics.jsonl` alone."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlora_trainer.training.log import read_metrics


def draw_losses(
    metrics_file: Path, picture: Path, *, unit: str = "trained token", metric: str = "loss"
) -> bool:
    """Draw training and held-out loss by step.

    A figure of its own, no pyplot: drawing must not touch the user's plots or need a display.

    Args:
        metrics_file: What the run logged.
        picture: PNG to write.
        unit: What the loss is a mean over.
        metric: What told the best step; drawn below where it is another than the loss.

    Returns:
        False where there is nothing to draw.
    """
    records = read_metrics(metrics_file)
    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    held_out = [
        (r["step"], r["eval_loss"]) for r in records if r["kind"] == "eval" and "eval_loss" in r
    ]
    if not train and not held_out:
        return False
    scored = [
        (r["step"], r[f"eval_{metric}"])
        for r in records
        if metric != "loss" and r["kind"] == "eval" and f"eval_{metric}" in r
    ]
    figure = Figure(figsize=(8, 6.5 if scored else 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes, *below = figure.subplots(
        2 if scored else 1, sharex=True, squeeze=False,
        height_ratios=[2, 1] if scored else None,
    ).flat  # fmt: skip
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db8d9", linewidth=0.8, label="each step")
        axes.plot(*zip(*_smoothed(train), strict=True), color="#1f5a9e", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#c4512d", label="held out")
    axes.set_ylabel(f"loss per {unit}")
    axes.legend(frameon=False)
    if scored:
        below[0].plot(*zip(*scored, strict=True), "o-", color="#c4512d")
        below[0].set_ylabel(f"held-out {metric}")
    for each in (axes, *below):
        each.grid(alpha=0.3)
    (axes, *below)[-1].set_xlabel("step")
    figure.savefig(picture)
    return True


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential mean over about a twentieth of the run, without the pull of its start."""
    keep = 1.0 - 1.0 / max(1.0, len(points) / 20)
    mean = weight = 0.0
    smooth = []
    for step, value in points:
        mean, weight = keep * mean + value, keep * weight + 1.0
        smooth.append((step, mean / weight))
    return smooth
