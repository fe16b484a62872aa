"""A training step under the tracker, its phases marked: weightless tensors and real ones alike."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.memory.tracker import AllocationTracker
from qlora_trainer.tasks.task import Batch, Task
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.processes import ALONE, Processes
from qlora_trainer.training.step import StepResult, train_step


def watch_step(
    tracker: AllocationTracker,
    model: Any,
    micro_batches: Sequence[Batch],
    *,
    task: Task,
    optimizer: AdapterAdamW,
    device: torch.device,
    step: int,
    processes: Processes = ALONE,
) -> None:
    """One training step with its phases marked: the same for weightless and for real tensors."""

    def before_update(_result: StepResult) -> bool:
        tracker.follow_engine(None)
        tracker.set_phase("optimizer step")
        return True

    tracker.follow_engine(("forward", "backward"))
    train_step(
        model,
        micro_batches,
        task=task,
        optimizer=optimizer,
        learning_rate=1e-4,
        device=device,
        step=step,
        check=before_update,
        processes=processes,
    )


def tag_gradients(tracker: AllocationTracker, parameters: Iterable[nn.Parameter]) -> None:
    """Book gradients under their own name as the engine hands them over."""

    def tag(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.tag(parameter.grad, "gradients")

    for parameter in parameters:
        if isinstance(parameter, nn.Parameter):
            parameter.register_post_accumulate_grad_hook(tag)
