"""The loss curve as a picture, from `metrics.jsonl` alone."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlora_trainer.training.log import read_metrics


def draw_losses(metrics_file: Path, picture: Path) -> bool:
    """Draw training and held-out loss by step; False where there is nothing to draw.

    A figure of its own, no pyplot: drawing must not touch the user's plots or need a display.
    """
    records = read_metrics(metrics_file)
    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    held_out = [
        (r["step"], r["eval_loss"]) for r in records if r["kind"] == "eval" and "eval_loss" in r
    ]
    if not train and not held_out:
        return False
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db8d9", linewidth=0.8, label="each step")
        axes.plot(*zip(*_smoothed(train), strict=True), color="#1f5a9e", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#c4512d", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per trained token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
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
