"""TensorBoard and Weights & Biases through accelerate's trackers; nothing is sent unless asked.

All they write lies in the run folder, Weights & Biases' own logs of its service included; with
`WANDB_MODE=offline` it needs no account and no network.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """See that the trackers asked for can be started; on a terminal Weights & Biases may ask.

    Raises:
        UserError: One is not installed (says which extra brings it), or has no account to log to.
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
    if "wandb" in names:
        import wandb

        try:
            wandb.login(verify=False)  # whether there is a key, without asking the server
        except (wandb.Error, TimeoutError) as error:
            raise _wandb_refusal(error) from None


def _wandb_refusal(error: Exception) -> UserError:
    return UserError(
        f"output.trackers = ['wandb']: Weights & Biases cannot be started ({error}); run "
        "`wandb login`, or set WANDB_MODE=offline in the environment, or leave it out"
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
        UserError: One is not installed, or cannot be started.
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
            tracker.start()
        else:
            tracker = WandBTracker(run_name, dir=str(folder))
            _start_wandb(tracker, folder)
        tracker.store_init_configuration(plain)
        opened.append(AccelerateTracker(tracker))
    return opened


def _start_wandb(tracker: Any, folder: Path) -> None:
    from wandb import Error

    try:
        with _variable("WANDB_CACHE_DIR", str(folder / "wandb" / "cache")):
            tracker.start()
    except Error as error:
        raise _wandb_refusal(error) from None


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """An environment variable for the processes started within, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
