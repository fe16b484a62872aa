"""What the training step and the evaluation need to know of a task, and nothing more.

A batch is made on the host (`prepare`), counted on the host (`loss_weight`), then moved to the
device, so that neither the step nor the evaluation ever asks a device how many tokens are trained:
on CUDA that question costs a synchronisation, on weightless (`meta`) tensors it has no answer.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qlora_trainer.base.packed_attention import is_example_lengths

Batch = Mapping[str, Tensor]


class Task(Protocol):
    """A loss summed over trained tokens, and metrics as sums, so that any split adds up."""

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Names of the evaluation's metrics; True where greater is better."""
        ...

    @property
    def best_metric(self) -> str:
        """The one that tells the best adapter, unless the run file names another."""
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


@dataclass(frozen=True)
class Scores:
    """What predictions are worth, where that is no sum over rows.

    Attributes:
        metrics: Figures by name.
        report: The same in full, as text with lines, for people.
        pictures: File name -> what draws it.
    """

    metrics: dict[str, float]
    report: str = ""
    pictures: dict[str, Callable[[Path], None]] = field(default_factory=dict)


@runtime_checkable
class ScoredTask(Task, Protocol):
    """A task whose predictions are gathered and scored together."""

    def evaluate_rows(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], list[Any]]:
        """Sums as `evaluate`, and one prediction (a JSON value) per row of a prepared batch."""
        ...

    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """One prediction per row; the batch need not know the answers."""
        ...

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
        """Hold predictions against references, both in the order of the data set."""
        ...

    def tell(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[dict[str, Any]]:
        """What was predicted for each record (of which there may be several rows), in order."""
        ...


def needed_mask(batch: Batch) -> dict[str, Tensor]:
    """`attention_mask`, unless it is all ones and says nothing (or is not there).

    Without it transformers takes its fused kernels.
    """
    mask = batch.get("attention_mask")
    return {} if mask is None or bool(mask.all()) else {"attention_mask": mask}


def cut_rows(batch: Batch, parts: int) -> list[dict[str, Tensor]]:
    """Cut every tensor of a collated batch along its rows into about so many parts.

    Where there are fewer rows than parts, rows of several packed examples are cut between those;
    one example stays whole.
    """
    rows = next(iter(batch.values())).shape[0]
    size = -(-rows // min(parts, rows))
    cut = [
        {name: tensor[start : start + size] for name, tensor in batch.items()}
        for start in range(0, rows, size)
    ]
    if parts <= rows:
        return cut
    return [piece for row in cut for piece in _cut_examples(row, -(-parts // rows))]


def _cut_examples(row: Batch, parts: int) -> list[dict[str, Tensor]]:
    """Cut one row at the starts of packed examples nearest to equal parts."""
    positions = row.get("position_ids")
    if positions is None or any(tensor.shape != positions.shape for tensor in row.values()):
        return [dict(row)]
    width = positions.shape[1]
    starts = torch.cat([positions.new_zeros(1), (positions[0] == 0).nonzero().flatten()])
    ideal = torch.arange(1, parts) * (width / parts)  # (parts - 1,)
    nearest = (starts[None] - ideal[:, None]).abs().argmin(1)
    cuts = sorted({0, *starts[nearest].tolist()})
    return [
        {name: tensor[:, start:end] for name, tensor in row.items()}
        for start, end in itertools.pairwise([*cuts, width])
    ]


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Move every tensor of a batch; the lengths of packed examples are read on the host."""
    return {
        name: tensor if is_example_lengths(tensor) else tensor.to(device, non_blocking=True)
        for name, tensor in batch.items()
    }
