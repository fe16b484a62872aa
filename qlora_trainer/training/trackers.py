"""TensorBoard and Weights & Biases through accelerate's trackers; nothing is sent unless asked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_trainer.errors import UserError

_EXTRAS = {"tensorboard": "tensorboard", "wandb": "wandb"}


class AccelerateTracker:
    """One of accelerate's trackers behind our small interface."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take one step's numbers."""
        self._tracker.log(dict(values), step=step)

    def finish(self) -> None:
        """Flush and close."""
        self._tracker.finish()


def require_trackers(names: Sequence[str]) -> None:
    """See that the trackers asked for can be started.

    Raises:
        UserError: One is not installed; says which extra brings it.
    """
    if not names:
        return
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    present = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    missing = [name for name in names if name not in present or not present[name]()]
    if missing:
        raise UserError.from_faults(
            "output.trackers: not installed",
            [f"{n}: pip install 'qlora-trainer[{_EXTRAS.get(n, n)}]'" for n in missing],
        )


def open_trackers(
    names: Sequence[str], folder: Path, *, run_name: str, settings: Mapping[str, Any]
) -> list[AccelerateTracker]:
    """Start the trackers asked for.

    Args:
        names: `tensorboard`, `wandb`.
        folder: Where they write.
        run_name: Shown in them.
        settings: Flat values stored with the run.

    Raises:
        UserError: One is not installed.
    """
    require_trackers(names)
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # the trackers ask it which process may write
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()
    }
    opened = []
    for name in names:
        if name == "tensorboard":
            tracker = TensorBoardTracker(run_name, logging_dir=folder)
        else:
            tracker = WandBTracker(run_name, dir=str(folder))
        tracker.start()
        tracker.store_init_configuration(plain)
        opened.append(AccelerateTracker(tracker))
    return opened
