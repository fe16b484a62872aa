"""One of several processes of a run, started by `test_processes.py`: does jobs, writes what it saw.

`python -m tests.run.several JOBS.json`: a list of run settings, trained one after the other, each
with `stop_after`, the step after which the main process gets SIGTERM, with `other_gets`, a signal
for process 1 and the step in which it comes, or with `other_has`, settings that process 1 has
otherwise. No clock decides when a signal is sent.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qlora_trainer import Reporter, UserError, train
from qlora_trainer.config.read import check_values
from qlora_trainer.training.attempt import StepRunner
from qlora_trainer.training.launch import join_processes
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.plan import TrainingPlan
from qlora_trainer.training.processes import Processes
from tests.training.tiny import adapted_llama, make_run, trained_values


class StopAfter(Reporter):
    """Sends this process SIGTERM once the loop shows a step, as a scheduler does.

    Attributes:
        resumed_after: The step of the saved state the loop went on from, as it says itself.
    """

    def __init__(self, step: int | None = None) -> None:
        self._shown, self._sent = f"step {step}/", False
        self.resumed_after: int | None = None

    def write(self, text: str) -> int:
        if resumed := re.search(r"resuming after step (\d+) of", text):
            self.resumed_after = int(resumed.group(1))
        if text.startswith(self._shown) and not self._sent:
            self._sent = True  # what the handler says flushes the same line again
            os.kill(os.getpid(), signal.SIGTERM)
        return len(text)

    def flush(self) -> None:
        pass

    def console(self) -> Console:
        return Console(file=self, width=1000, soft_wrap=True)  # type: ignore[arg-type]


@contextmanager
def signalled_in(step: int, name: str) -> Iterator[None]:
    """Within, this process sends itself a signal as it begins a step.

    Where every step is saved, the one before is by then: all wait until the main one has written.
    """
    run = StepRunner.run

    def begin(runner: StepRunner, window: Any, **rest: Any) -> Any:
        if rest["step"] + 1 == step:
            os.kill(os.getpid(), signal.Signals[name])
        return run(runner, window, **rest)

    StepRunner.run = begin  # type: ignore[method-assign]
    try:
        yield
    finally:
        StepRunner.run = run  # type: ignore[method-assign]


class ShortOfMemory:
    """A task that has room for one row at a time only, in one of the processes."""

    def __init__(self, task: Any, here: bool) -> None:
        self._task, self._here = task, here

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def loss_sum(self, model: Any, batch: Any) -> torch.Tensor:
        if self._here and batch["input_ids"].shape[0] > 1:
            raise torch.OutOfMemoryError("made up")
        return self._task.loss_sum(model, batch)


def short_of_memory(folder: Path, processes: Processes) -> dict[str, Any]:
    """Train where process 1 has less memory; -> parts and the adapter's sum."""
    model = adapted_llama()
    run = make_run(folder, model, total_steps=3, accumulation=3, processes=processes)
    short = replace(run, task=ShortOfMemory(run.task, processes.rank == 1))
    outcome = run_training(short, TrainingPlan(3, 1e-2, seed=5))
    values = {name: value.tolist() for name, value in trained_values(model).items()}
    return {"parts": outcome.micro_batch_parts, "values": values}


def fault_in_one(processes: Processes) -> dict[str, str]:
    """What each process hears of a fault in process 1."""
    try:
        with processes.together():
            if processes.rank == 1:
                raise UserError("no such column")
    except UserError as error:
        return told(error)
    return {}


def told(error: UserError) -> dict[str, str]:
    """What the test is to know of an error."""
    return {"kind": type(error).__name__, "said": str(error)}


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    rank = int(os.environ["RANK"])
    seen: dict[str, Any] = {}
    for name, job in jobs["runs"].items():
        settings = job["settings"]
        unlike = job.get("other_has", {})
        if rank:  # a machine of its own, with nothing of the run on its disk
            settings["output"]["folder"] += "-elsewhere"
            for section, values in unlike.items():
                settings[section].update(values)
        reporter = StopAfter(job.get("stop_after"))
        signalled = job.get("other_gets") if rank == 1 else None
        try:
            with signalled_in(**signalled) if signalled else nullcontext():
                result = train(check_values(settings), reporter=reporter)
        except UserError as error:
            if not unlike:
                raise
            seen[name] = told(error)
            continue
        seen[name] = {"step": result.outcome.step, "complete": result.outcome.complete,
                      "reason": result.outcome.reason, "resumed_after": reporter.resumed_after,
                      "wrote": Path(settings["output"]["folder"]).exists()}  # fmt: skip
    with join_processes("cpu") as processes:
        seen["facts"] = [processes.rank, processes.count, list(processes.share(5))]
        seen["fault"] = fault_in_one(processes)
        seen["memory"] = short_of_memory(Path(f"{sys.argv[1]}-memory-{rank}"), processes)
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
