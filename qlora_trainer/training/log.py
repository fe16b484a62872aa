"""What a run shows while it runs, and what it leaves to be read: lines, a bar, `metrics.jsonl`.

One JSON object per line, written and flushed as it happens, so a killed run loses nothing; on
resuming, lines past the resumed step are cut. The remaining time counts evaluations and saves
still to come, each at the mean of those already seen.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from qlora_trainer.base.files import write_atomically
from qlora_trainer.errors import UserError
from qlora_trainer.units import format_bytes, format_seconds

Phase = Literal["step", "evaluate", "save"]
_RECENT_STEPS = 20


class Tracker(Protocol):
    """Where metrics also go (TensorBoard, Weights & Biases)."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take one step's numbers."""
        ...

    def finish(self) -> None:
        """Flush and close."""
        ...


class Remaining:
    """Time still needed, from the means of what was seen."""

    def __init__(self) -> None:
        self._seen: dict[Phase, deque[float]] = {
            "step": deque(maxlen=_RECENT_STEPS),
            "evaluate": deque(maxlen=3),
            "save": deque(maxlen=3),
        }

    def add(self, phase: Phase, seconds: float) -> None:
        """Note how long one took."""
        self._seen[phase].append(seconds)

    def seconds(self, counts: Mapping[Phase, int]) -> float | None:
        """Seconds for so many of each phase; None while no step was seen.

        >>> left = Remaining()
        >>> left.add("step", 2.0); left.add("evaluate", 30.0)
        >>> left.seconds({"step": 10, "evaluate": 2, "save": 1})
        80.0
        """
        if not self._seen["step"]:
            return None
        means = {name: sum(seen) / len(seen) for name, seen in self._seen.items() if seen}
        return sum(means.get(phase, 0.0) * count for phase, count in counts.items())


class RunLog:
    """Shows progress and keeps `metrics.jsonl`; use it as a context manager.

    Args:
        metrics_file: Where lines go.
        total_steps: Of the whole run.
        every_steps: Steps per line of metrics; shown lines too, where there is no terminal.
        console: Where to show; standard error unless given.
        trackers: Get every line as well.
        device: Whose memory is shown.
    """

    def __init__(
        self,
        metrics_file: Path | None,
        *,
        total_steps: int,
        every_steps: int = 1,
        console: Console | None = None,
        trackers: Sequence[Tracker] = (),
        device: torch.device | None = None,
    ) -> None:
        self._file = metrics_file
        self._total = total_steps
        self._every = every_steps
        self._console = console or Console(file=sys.stderr, soft_wrap=True)
        self._trackers = trackers
        self._device = device or torch.device("cpu")
        self._bar: Progress | None = None
        self._bar_task: TaskID | None = None
        self.remaining = Remaining()

    def __enter__(self) -> "RunLog":
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[details]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar_task = self._bar.add_task("training", total=self._total, details="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        for tracker in self._trackers:
            tracker.finish()

    def begin(self, step: int, *, evaluated: bool = True) -> None:
        """Start or resume at a step: cut what was logged past it.

        Args:
            step: Where the run stands.
            evaluated: False where the evaluation at this step is still to come (again).
        """
        if self._file is not None:
            cut_metrics(self._file, step, evaluated=evaluated)
        self._show(step, "")

    def say(self, line: str) -> None:
        """Show one line to the user, above the bar."""
        self._console.print(line, highlight=False, markup=False)

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Time an evaluation, a save or a step, for the remaining time."""
        start = time.perf_counter()
        yield
        self.remaining.add(phase, time.perf_counter() - start)

    def step(self, values: Mapping[str, float], counts_left: Mapping[Phase, int]) -> None:
        """Log a step.

        Args:
            values: With `step`, `loss`, `tokens_per_second` at least.
            counts_left: Steps, evaluations and saves still to come.
        """
        memory_bytes = self._memory_bytes()
        done = int(values["step"])
        if done % self._every == 0 or done == self._total:
            self._write({"kind": "train", **values, "memory_bytes": memory_bytes})
        left = self.remaining.seconds(counts_left)
        details = (
            f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s  "
            f"{format_bytes(memory_bytes)}  "
            + ("" if left is None else f"{format_seconds(left)} left")
        )
        self._show(done, details)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log an evaluation."""
        self._write({"kind": "eval", "step": step, **{f"eval_{k}": v for k, v in metrics.items()}})
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if k not in ("tokens", "rows"))
        self.say(f"step {step}: held-out {shown}")

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        line = json.dumps(record)
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise _refusal(self._file, error, f"; the line that is not in it: {line}") from error
        numbers = {k: float(v) for k, v in record.items() if k not in ("kind", "step")}
        for tracker in self._trackers:
            tracker.log(numbers, int(record["step"]))

    def _show(self, step: int, details: str) -> None:
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(self._bar_task, completed=step, details=details)
        elif details and (step % max(self._every, self._total // 20, 1) == 0 or step <= 1):
            self.say(f"step {step}/{self._total}  {details}")

    def _memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return int(psutil.Process().memory_info().rss)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read whole lines; a line torn by a kill is left out."""
    records = []
    if file.exists():
        for line in file.read_bytes().splitlines():
            try:
                record = json.loads(line)
                if not isinstance(record["step"], int) or not isinstance(record["kind"], str):
                    break
            except (ValueError, TypeError, KeyError, RecursionError):  # not JSON, or not ours
                break
            records.append(record)
    return records


def cut_metrics(file: Path, step: int, *, evaluated: bool = True) -> None:
    """Keep the lines up to a step; of an evaluation at that step only with `evaluated`.

    Raises:
        UserError: The file or its folder cannot be written.
    """
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            return
        kept = [
            json.dumps(record) + "\n"
            for record in read_metrics(file)
            if record["step"] < step
            or (record["step"] == step and (evaluated or record["kind"] != "eval"))
        ]
        write_atomically(file, lambda path: path.write_text("".join(kept), encoding="utf-8"))
    except OSError as error:
        raise _refusal(file, error, "") from error


def _refusal(file: Path, error: OSError, more: str) -> UserError:
    return UserError(
        f"{file}: cannot be written ({error.strerror}); saved states are untouched. Make room or "
        f"mend the folder, then run the same command again{more}"
    )
