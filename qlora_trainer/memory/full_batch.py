"""The largest micro-batch of a run, where there are no data: what is foreseen.

Of packed rows nobody knows how many examples share them before the data are read. Memory knows two
worst cases, which do not exclude each other: an example as long as can be (the scratch memory of
attention example by example grows with the longest one), and as many as can be (the
variable-length kernel rounds up each one's rows). So the first example of a row takes all but one
token of each of the others, and there are two of them unless the data have told more.

    R rows, T tokens
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.data.batches import row_layout
from qlora_trainer.memory.attention import FORESEEN
from qlora_trainer.memory.program import RunShape
from qlora_trainer.tasks.catalogue import task_kind


def full_batch(
    shape: RunShape, config: Any = None, attention: str | None = None
) -> dict[str, Tensor]:
    """The largest micro-batch that is trained, on the host and not yet prepared.

    Args:
        shape: The run's settings.
        config: The model's configuration; a causal model's batch needs none.
        attention: What the model has, which decides how packed rows lie.

    Returns:
        As `data/batches.py` collates: (R, T), or (1, R T) where packed rows lie end to end.
    """
    batch = task_kind(shape.task).weightless_batch(
        config,
        rows=shape.micro_batch_size,
        tokens=shape.seq_len,
        padded=shape.padded,
        settings=shape.task_settings,
    )
    if not shape.packed:
        return batch
    batch["position_ids"] = row_positions(shape.seq_len, shape.examples).repeat(
        shape.micro_batch_size, 1
    )
    if attention is None or attention.startswith(FORESEEN) or row_layout(attention) == "rows":
        return batch
    return {name: tensor.reshape(1, -1) for name, tensor in batch.items()}


def held_out_batch(shape: RunShape, config: Any = None) -> dict[str, Tensor] | None:
    """The largest micro-batch that is evaluated, an example a row; None where it is as trained."""
    if shape.longest_held_out == 0:
        return None
    rows = shape.held_out_rows or shape.micro_batch_size
    tokens = min(shape.seq_len, shape.longest_held_out or shape.seq_len)
    evaluated = replace(shape, packed=False, padded=rows > 1, micro_batch_size=rows, seq_len=tokens)
    return None if evaluated == shape else full_batch(evaluated, config)


def row_positions(tokens: int, examples: int) -> Tensor:
    """Positions (T,) of a row of one long example and others of one token.

    >>> row_positions(5, 3).tolist()
    [0, 1, 2, 0, 0]
    """
    others = min(examples, tokens) - 1
    return torch.cat((torch.arange(tokens - others), torch.zeros(others, dtype=torch.int64)))
