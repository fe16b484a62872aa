"""Held-out metrics, streamed: sums on the device, one number each at the end, no logits kept.

Every metric is weighted by trained tokens exactly, whatever the evaluation's micro-batch; nothing
grows with the size of the held-out set. A batch that does not fit is cut in halves, which changes
no sum.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from qlora_trainer.errors import UserError
from qlora_trainer.tasks.task import Batch, Task, cut_rows, to_device


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: Task,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Mean of the task's metrics over all trained tokens, and `tokens`.

    The model's training mode is put back as it was.

    Args:
        model: On `device`.
        batches: Collated, on the host.
        task: The metrics.
        device: Where the model is.
        say: Told once when memory makes batches smaller.

    Raises:
        UserError: No token of any batch counts, the loss is not finite, or one row does not fit.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    weight, parts = 0, 1
    try:
        for batch in batches:
            results = None
            while results is None:
                results = _try(model, cut_rows(batch, parts), task, device)
                if results is None:
                    parts = _smaller(batch, parts, device, say)
            for counted, found in results:
                weight += counted
                for name, value in found.items():
                    sums[name] = sums[name] + value if name in sums else value
    finally:
        model.train(was_training)
    if weight == 0:
        raise UserError("data.eval: no token of the held-out rows is trained on; nothing to score")
    metrics = {name: float(value) / weight for name, value in sums.items()}
    if not math.isfinite(metrics.get("loss", 0.0)):
        raise UserError(
            f"the held-out loss is {metrics['loss']}: the model's outputs overflow in its compute "
            "dtype (try model.compute_dtype: bf16 or fp32), or a held-out row breaks it"
        )
    return {**metrics, "tokens": float(weight)}


def _try(
    model: nn.Module, parts: list[dict[str, Tensor]], task: Task, device: torch.device
) -> list[tuple[int, dict[str, Tensor]]] | None:
    """Weight and sums of each part; None where memory does not suffice."""
    results = []
    try:
        for part in parts:
            prepared = task.prepare(part)
            counted = task.loss_weight(prepared)
            if counted == 0:
                continue
            found = task.evaluate(model, to_device(prepared, device))
            # fp64: a sum over millions of tokens in fp32 loses the last ones
            results.append((counted, {name: value.double() for name, value in found.items()}))
    except torch.OutOfMemoryError:
        return None
    return results


def _smaller(batch: Batch, parts: int, device: torch.device, say: Callable[[str], None]) -> int:
    rows, tokens = batch["input_ids"].shape
    size = -(-rows // min(parts, rows))
    if size == 1:
        raise UserError(
            f"evaluation: out of memory with a single sequence of {tokens} tokens; take a smaller "
            "data.max_seq_len, or leave evaluation out"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    say(
        f"evaluation: out of memory with {size} sequences at a time; going on with half, which "
        "changes no result. evaluation.micro_batch_size can be lowered in the run file"
    )
    return 2 * min(parts, rows)
