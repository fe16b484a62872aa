"""What the loop is given, what it remembers, what it returns: plain values and callables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_trainer.tasks.task import Batch, Task
from qlora_trainer.training.attempt import Decode
from qlora_trainer.training.log import RunLog
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.processes import ALONE, Processes
from qlora_trainer.training.scaler import LossScaler
from qlora_trainer.training.schedule import Schedule
from qlora_trainer.training.windows import Windows


@dataclass(frozen=True)
class TrainingPlan:
    """What the loop is to do, in plain values.

    Attributes:
        total_steps: Optimizer steps of the whole run.
        learning_rate: Peak.
        schedule: What follows the warm-up.
        warmup_steps: Of the learning rate.
        max_grad_norm: None does not clip.
        seed: Of dropout.
        evaluate_every_steps: Also always at the end, where there are held-out rows.
        save_every_steps: Also always at the end and when stopped.
        save_every_seconds: However many steps that is: what a kill can cost at most.
        keep_last: Saved states kept.
        patience: Stop after so many evaluations without a better metric.
        best_metric: Name of an evaluation's metric that decides.
        greater_is_better: Its direction.
    """

    total_steps: int
    learning_rate: float
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    seed: int = 0
    evaluate_every_steps: int | None = None
    save_every_steps: int | None = None
    save_every_seconds: float = 600.0
    keep_last: int = 2
    patience: int | None = None
    best_metric: str = "loss"
    greater_is_better: bool = False


@dataclass
class Course:
    """Where the run stands; saved and resumed."""

    step: int = 0
    best_value: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    first_evaluation: dict[str, float] | None = None  # before any step
    best_evaluation: dict[str, float] | None = None
    last_evaluation: dict[str, float] | None = None
    last_evaluation_step: int | None = None
    micro_batch_parts: int = 1
    stopped_early: bool = False


@dataclass(frozen=True)
class TrainingOutcome:
    """How the run ended.

    Attributes:
        step: Applied steps.
        complete: False where a signal stopped it; the state is saved then.
        reason: In words.
        best_step: Whose adapter is in `adapter/`; None without evaluation.
        best_value: Its metric.
        best_metric: The name of that.
        first_evaluation: Metrics before any step, where there are held-out rows.
        best_evaluation: Metrics of the best step.
        last_evaluation: Metrics of the last evaluation.
        overflows: fp16 steps tried again.
        micro_batch_parts: Above 1 where memory made micro-batches smaller.
    """

    step: int
    complete: bool
    reason: str
    best_step: int | None
    best_value: float | None
    first_evaluation: dict[str, float] | None
    best_evaluation: dict[str, float] | None
    last_evaluation: dict[str, float] | None
    overflows: int
    micro_batch_parts: int
    best_metric: str = "loss"


@dataclass(frozen=True)
class Rehearsal:
    """What is tried before the first step (`rehearse.py`).

    Attributes:
        window: The longest training micro-batch, collated; twice where gradients accumulate.
        held_out: The longest evaluation batch, if there are held-out rows.
    """

    window: Sequence[Batch]
    held_out: Batch | None


@dataclass(frozen=True)
class Run:
    """The parts the loop drives.

    Attributes:
        model: With adapters, on `device`.
        task: Loss and metrics.
        optimizer: Over the trained parameters.
        windows: Training data by step.
        device: Where the model is.
        folder: The run folder; states, adapters and a failed batch go there.
        save_adapter: Fills a folder with the adapter as it is now.
        identity: Recorded with each state (data fingerprint, settings, ...); must be JSON.
        log: What is shown and kept.
        eval_batches: Begins a pass over this process' share of the held-out batches; None where
            there are none.
        references: What the prediction for a held-out row is scored against, by its number, for
            a task whose predictions are scored.
        scaler: For fp16.
        decode: Token ids to text, for a batch that failed.
        rehearsal: What is tried before the first step of a process; None tries nothing.
        watch: Entered around the first step of a process, with its window, to measure it.
        processes: Those that make this run together; the main one alone writes.
    """

    model: nn.Module
    task: Task
    optimizer: AdapterAdamW
    windows: Windows
    device: torch.device
    folder: Path
    save_adapter: Callable[[Path], None]
    identity: Mapping[str, Any]
    log: RunLog
    eval_batches: Callable[[], Iterable[Batch]] | None = None
    references: Callable[[int], Any] | None = None
    scaler: LossScaler | None = None
    decode: Decode | None = None
    rehearsal: Rehearsal | None = None
    watch: Callable[[Sequence[Batch]], AbstractContextManager[None]] | None = None
    processes: Processes = ALONE
