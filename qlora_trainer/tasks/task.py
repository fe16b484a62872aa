"""What the training step and the evaluation need to know of a task, and nothing more.

A batch is made on the host (`prepare`), counted on the host (`loss_weight`), then moved to the
device, so that neither the step nor the evaluation ever asks a device how many tokens are trained:
on CUDA that question costs a synchronisation, on weightless (`meta`) tensors it has no answer.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


class Task(Protocol):
    """A loss summed over trained tokens, and metrics as sums, so that any split adds up."""

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Names of the evaluation's metrics; True where greater is better."""
        ...

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Turn a collated host batch into what `loss_sum` takes; keys it does not need are left."""
        ...

    def loss_weight(self, batch: Batch) -> int:
        """Trained tokens of a prepared batch: a shape, never a value on a device."""
        ...

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss summed (not averaged) over the trained tokens; fp32 scalar with a graph."""
        ...

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums over trained tokens, by name: `loss` and the task's metrics; no graph."""
        ...


def cut_rows(batch: Batch, parts: int) -> list[dict[str, Tensor]]:
    """Cut every tensor of a collated batch along its rows into at most so many parts."""
    rows = next(iter(batch.values())).shape[0]
    size = -(-rows // min(parts, rows))
    return [
        {name: tensor[start : start + size] for name, tensor in batch.items()}
        for start in range(0, rows, size)
    ]


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Move every tensor of a batch."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
