"""What the loop writes: states, adapters, and the state of a run that is about to fail.

Of several processes the main one writes, and the others wait until it has.

A full disk or a folder that cannot be written is the user's to mend, so it is named, and what was
saved before stands.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qlora_trainer.base.files import replace_folder, write_text_atomically
from qlora_trainer.errors import UserError
from qlora_trainer.training.folder import BEST_PREDICTIONS
from qlora_trainer.training.plan import Course, Run, TrainingPlan
from qlora_trainer.training.state import save_state


class Saver:
    """Writes into one run's folder.

    Attributes:
        states: Folder of the saved states.
        saved_step: The newest state's; None while there is none.
        damaged: States that the run did not go on from, as they are not whole.
    """

    def __init__(self, run: Run, plan: TrainingPlan) -> None:
        self._run, self._plan = run, plan
        self.states = run.folder / "states"
        self.saved_step: int | None = None
        self.damaged: tuple[Path, ...] = ()
        self._saved_at = time.monotonic()

    def is_overdue(self) -> bool:
        """The last save is longer ago than the plan allows, however few steps that was."""
        return time.monotonic() - self._saved_at >= self._plan.save_every_seconds

    def save(self, course: Course, *, again: bool = False) -> None:
        """Save the state, unless the one of this step stands already.

        Args:
            course: Where the run stands.
            again: Replace the state of this step: the course has learned something since.

        Raises:
            UserError: The state cannot be written.
        """
        if self.saved_step == course.step and not again:
            return
        processes = self._run.processes
        with processes.together():
            if processes.is_main:
                with processes.busy():
                    self._save(course)
        self.saved_step, self._saved_at = course.step, time.monotonic()

    def _save(self, course: Course) -> None:
        run = self._run
        with run.log.timed("save"):
            save_state(
                self.states,
                course.step,
                optimizer=run.optimizer,
                trainer={
                    "course": asdict(course),
                    "scaler": run.scaler.state() if run.scaler is not None else None,
                    "seed": self._plan.seed,
                    "epoch": run.windows.position(course.step),
                    "identity": dict(run.identity),
                },
                keep_last=self._plan.keep_last,
                damaged=self.damaged,
            )

    def save_adapter(self, name: str) -> None:
        """Write the adapter as it is now into a folder of the run.

        Raises:
            UserError: It cannot be written.
        """
        with self._run.processes.together():
            if self._run.processes.is_main:
                self._write_adapter(name)

    def _write_adapter(self, name: str) -> None:
        folder = self._run.folder / name
        try:
            replace_folder(folder, self._run.save_adapter)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder}: the adapter cannot be written ({error}); saved states are untouched. "
                "Make room or mend the folder, then run the same command again"
            ) from error

    def save_predictions(self, predictions: Sequence[Any]) -> None:
        """Write what the best adapter said of the held-out rows, one JSON value a row.

        Raises:
            UserError: They cannot be written.
        """
        with self._run.processes.together():
            if self._run.processes.is_main:
                self._write_predictions(predictions)

    def _write_predictions(self, predictions: Sequence[Any]) -> None:
        file = self._run.folder / BEST_PREDICTIONS
        try:
            write_text_atomically(file, json.dumps(list(predictions)) + "\n")
        except OSError as error:
            raise UserError(
                f"{file}: cannot be written ({error}); saved states are untouched. Make room or "
                "mend the folder, then run the same command again"
            ) from error

    def save_before_leaving(self, course: Course) -> None:
        """Keep what is good when a step or an evaluation fails; the error itself is to go on.

        Args:
            course: Of the last update that was applied.
        """
        run, step = self._run, course.step
        if not run.processes.is_main:
            return
        if run.optimizer.half_applied:
            last = f"of step {self.saved_step}" if self.saved_step is not None else "there is none"
            run.log.say(
                f"step {step}: the update was cut short, so the adapters are of no step and were "
                f"not saved; the last saved state stands ({last})"
            )
            return
        if step == 0:
            return
        try:
            if self.saved_step != step:
                self._save(course)
                self.saved_step = step
        except (UserError, RuntimeError, OSError, MemoryError) as error:
            run.log.say(f"the state after step {step} could not be saved either: {error}")
            return
        run.log.say(
            f"the state after step {step} is saved: mend the cause (a loss that is not finite "
            "often needs a lower train.learning_rate), and the same command goes on from there. "
            f"If it fails there again, delete {self.states / f'step-{step:08d}'} to go on from "
            "an earlier state"
        )
