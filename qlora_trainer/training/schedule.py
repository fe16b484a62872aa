"""The learning rate of a step: a pure function, so that resuming has nothing to restore."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_factor(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    schedule: Schedule,
    floor: float = 0.0,
) -> float:
    """Share of the peak learning rate that a step uses.

    The warm-up ends at 1 with its last step and starts above 0, so that the very first step moves
    every adapter.

    Args:
        step: Counted from 0.
        total_steps: Steps of the whole run.
        warmup_steps: Linear warm-up over this many steps.
        schedule: What follows the warm-up.
        floor: Share that cosine and linear end at.

    >>> [learning_rate_factor(s, total_steps=6, warmup_steps=2, schedule="linear")
    ...  for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    share = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return floor + (1.0 - floor) * share
