"""The steps of a run as one writes them by hand: torch's AdamW, all gradients clipped together.

What `peft_twin.py` and `peft_task_twin.py` share. Learning rates, clipping, seeds of dropout and
micro-batches are those the run file makes in this package.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qlora_trainer.training.schedule import learning_rate_factor
from qlora_trainer.training.step import seed_random

Batch = dict[str, torch.Tensor]


class Clock:
    """Time since it was made, on the clock and of the processor.

    Processor time (of this process and the children it has waited for) does not grow while
    others use the machine or the process is paused.
    """

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), _processor_seconds()

    def read(self) -> dict[str, float]:
        """`seconds` and `processor_seconds`, rounded to tenths."""
        return {
            "seconds": round(time.perf_counter() - self._wall, 1),
            "processor_seconds": round(_processor_seconds() - self._processor, 1),
        }


def _processor_seconds() -> float:
    return sum(os.times()[:4])


def train_steps(
    run: Any,
    plan: Any,
    parameters: Sequence[torch.nn.Parameter],
    window_of: Callable[[int], Sequence[Batch]],
    *,
    loss_sum: Callable[[Batch], torch.Tensor],
    loss_weight: Callable[[Batch], float],
    said: Callable[[str], None] = lambda line: None,
) -> list[float]:
    """Train.

    Args:
        run: The checked run file; AdamW's settings are taken from it.
        plan: `setup.training_plan`'s.
        parameters: What is trained.
        window_of: The micro-batches of a step, counted from 0.
        loss_sum: Of a micro-batch.
        loss_weight: What its sum is a sum over, such as tokens.
        said: Called with a line for every step.

    Returns:
        The mean loss of each step.
    """
    optimizer = torch.optim.AdamW(
        parameters,
        betas=(run.train.beta1, run.train.beta2),
        eps=run.train.epsilon,
        weight_decay=run.train.weight_decay,
    )
    losses = []
    for step in range(plan.total_steps):
        factor = learning_rate_factor(
            step,
            total_steps=plan.total_steps,
            warmup_steps=plan.warmup_steps,
            schedule=plan.schedule,
        )
        optimizer.param_groups[0]["lr"] = plan.learning_rate * factor
        window = window_of(step)
        weight = sum(map(loss_weight, window))
        losses.append(0.0)
        for number, batch in enumerate(window):
            seed_random(plan.seed, step, number)
            loss = loss_sum(batch) / weight
            loss.backward()
            losses[-1] += float(loss.detach())
        if plan.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        said(f"PEFT step {step + 1}/{plan.total_steps}  loss {losses[-1]:.4f}")
    return losses
