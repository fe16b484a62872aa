"""Held-out metrics, streamed: sums on the device, one number each at the end, no logits kept.

Every metric is weighted by trained tokens (or rows) exactly, whatever the evaluation's micro-batch;
nothing grows with the size of the held-out set but the predictions of tasks that score them
together. A batch that does not fit is cut in halves, which changes no sum. Several processes
exchange the sums of each batch and add them in its place, so that they change no bit.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.errors import UserError
from qlora_trainer.tasks.task import Batch, ScoredTask, Scores, Task, cut_rows, to_device
from qlora_trainer.training.processes import ALONE, Processes

References = Callable[[int], Any]


@dataclass(frozen=True)
class Evaluation:
    """What held-out rows say.

    Attributes:
        metrics: By name, and `tokens` (of a causal model) or `rows`.
        scores: Report and pictures, where predictions are scored.
        predictions: One per row, in the order of the data set.
    """

    metrics: dict[str, float]
    scores: Scores | None = None
    predictions: list[Any] = field(default_factory=list)


@dataclass
class _Gathered:
    """Sums and predictions so far."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    weight: int = 0
    predictions: dict[int, Any] = field(default_factory=dict)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: Task,
    device: torch.device,
    say: Callable[[str], None] = print,
    references: References | None = None,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """The metrics of `examine`."""
    return examine(
        model, batches, task=task, device=device, say=say, references=references,
        processes=processes,
    ).metrics  # fmt: skip


@torch.no_grad()
def examine(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: Task,
    device: torch.device,
    say: Callable[[str], None] = print,
    references: References | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Mean of the task's metrics over all trained tokens or rows, and what is scored together.

    The model's training mode is put back as it was.

    Args:
        model: On `device`.
        batches: Collated, on the host; with `row`, the number of each row, for scored tasks. Of
            several processes each has its share (`Processes.share`).
        task: The metrics.
        device: Where the model is.
        say: Told once when memory makes batches smaller.
        references: By row number; scored tasks alone have them.
        processes: All of them examine together.

    Raises:
        UserError: No token of any batch counts, the loss is not finite, or one row does not fit.
    """
    was_training = model.training
    model.eval()
    scored = task if references is not None and isinstance(task, ScoredTask) else None
    gathered, parts = _Gathered(), 1
    of_batches: list[_Gathered] = []
    try:
        with processes.together():
            for batch in batches:
                of_batches += [_Gathered()] if processes.count > 1 else []
                place = of_batches[-1] if of_batches else gathered
                while not _try(model, cut_rows(batch, parts), task, scored, device, place):
                    parts = _smaller(batch, parts, device, say)
    finally:
        model.train(was_training)
    if processes.count > 1:
        gathered = _of_all(of_batches, processes)
    if gathered.weight == 0:
        raise UserError("data.eval: no token of the held-out rows is trained on; nothing to score")
    metrics = {name: float(value) / gathered.weight for name, value in gathered.sums.items()}
    if not math.isfinite(metrics.get("loss", 0.0)):
        raise UserError(
            f"the held-out loss is {metrics['loss']}: the model's outputs overflow in its compute "
            "dtype (try model.compute_dtype: bf16 or fp32), or a held-out row breaks it"
        )
    if scored is None or references is None:
        return Evaluation({**metrics, "tokens": float(gathered.weight)})
    order = sorted(gathered.predictions)
    predictions = [gathered.predictions[row] for row in order]
    scores = scored.score(predictions, [references(row) for row in order])
    rows = {"rows": float(len(order))}
    return Evaluation({**metrics, **scores.metrics, **rows}, scores, predictions)


def _of_all(of_batches: list[_Gathered], processes: Processes) -> _Gathered:
    """What all processes have gathered, added batch by batch in the order of the data."""
    mine = [
        [{name: float(value) for name, value in part.sums.items()}, part.weight,
         list(part.predictions.items())]
        for part in of_batches
    ]  # fmt: skip
    whole = _Gathered()
    for turn in itertools.zip_longest(*processes.gather(mine)):
        for sums, weight, predictions in filter(None, turn):
            whole.weight += weight
            whole.predictions.update(predictions)
            for name, value in sums.items():
                added = torch.tensor(value, dtype=torch.float64)
                whole.sums[name] = whole.sums[name] + added if name in whole.sums else added
    return whole


def _try(
    model: nn.Module,
    parts: list[dict[str, Tensor]],
    task: Task,
    scored: ScoredTask | None,
    device: torch.device,
    gathered: _Gathered,
) -> bool:
    """Add a batch to what is gathered; False, and nothing added, where memory does not suffice."""
    results = []
    try:
        for part in parts:
            prepared = task.prepare(part)
            counted = task.loss_weight(prepared)
            if counted == 0 and scored is None:
                continue
            on_device = to_device(prepared, device)
            predicted: list[Any] = []
            if scored is None:
                found = task.evaluate(model, on_device)
            else:
                found, predicted = scored.evaluate_rows(model, on_device)
            # fp64: a sum over millions of tokens in fp32 loses the last ones
            sums = {name: value.double() for name, value in found.items()}
            results.append((counted, sums, predicted, part))
    except torch.OutOfMemoryError:
        return False
    for counted, sums, predicted, part in results:
        gathered.weight += counted
        for name, value in sums.items():
            gathered.sums[name] = gathered.sums[name] + value if name in gathered.sums else value
        if scored is not None:
            gathered.predictions.update(zip(part["row"].tolist(), predicted, strict=True))
    return True


def _smaller(batch: Batch, parts: int, device: torch.device, say: Callable[[str], None]) -> int:
    rows = next(iter(batch.values())).shape[0]
    size = -(-rows // min(parts, rows))
    if size == 1:
        tokens = batch["input_ids"].shape[1] if "input_ids" in batch else 0
        what = f"sequence of {tokens} tokens" if tokens else "image"
        raise UserError(
            f"evaluation: out of memory with a single {what}; take a smaller "
            "data.max_seq_len, or leave evaluation out"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    say(
        f"evaluation: out of memory with {size} sequences at a time; going on with half, which "
        "changes no result. evaluation.micro_batch_size can be lowered in the run file"
    )
    return 2 * min(parts, rows)
