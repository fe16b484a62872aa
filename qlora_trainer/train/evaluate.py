"""Held-out metrics, streamed: sums on the device, one number each at the end, no logits kept.

Every metric is weighted by trained tokens exactly, whatever the evaluation's micro-batch; nothing
grows with the size of the held-out set.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qlora_trainer.errors import UserError
from qlora_trainer.tasks.task import Batch, Task, to_device


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, task: Task, device: torch.device
) -> dict[str, float]:
    """Mean of the task's metrics over all trained tokens.

    The model's training mode is put back as it was.

    Args:
        model: On `device`.
        batches: Collated, on the host.
        task: The metrics.
        device: Where the model is.

    Raises:
        UserError: No token of any batch counts, or the loss is not finite.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    weight = 0
    try:
        for batch in batches:
            prepared = task.prepare(batch)
            counted = task.loss_weight(prepared)
            if counted == 0:
                continue
            weight += counted
            for name, value in task.evaluate(model, to_device(prepared, device)).items():
                # fp64: a sum over millions of tokens in fp32 loses the last ones
                value = value.double()
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
