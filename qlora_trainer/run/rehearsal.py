"""The longest batches of a run's data, which are tried before its first step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qlora_trainer.config.settings import RunConfig
from qlora_trainer.data.batches import BatchPlan, collate, row_layout
from qlora_trainer.training import setup
from qlora_trainer.training.plan import Rehearsal


def rehearsal_of(
    run: RunConfig, data: setup.RunData, model: Any, device: torch.device, processes: int = 1
) -> Rehearsal | None:
    """The longest batches of a run; None where nothing is to be rehearsed.

    Of several processes each rehearses, so there is a batch for each.

    By default a run on a CPU is not: memory there does not end in an error that could be caught
    (the system swaps, or kills), and the longest step may take minutes.
    """
    wanted = run.memory.rehearse
    if wanted == "never" or (wanted == "auto" and device.type != "cuda"):
        return None
    size = run.train.micro_batch_size
    if run.data.packing:
        plan = BatchPlan(data.train.lengths, micro_batch_size=size, seed=run.train.seed,
                         packing=True, capacity=run.data.max_seq_len)  # fmt: skip
        rows = max(plan.epoch(0), key=lambda rows: _padded_tokens(rows, data.train.lengths))
        layout = row_layout(model.config._attn_implementation)
        batch = collate(data.train, rows, pad_id=data.pad_id, packed=True, layout=layout)
    else:
        batch = dict(setup.collate_rows(run, data, data.train, _longest(data.train.lengths, size)))
    held_out = None
    if data.held_out is not None and len(data.held_out):
        chosen = _longest(data.held_out.lengths, run.evaluation.micro_batch_size or size)
        held_out = {
            **setup.collate_rows(run, data, data.held_out, chosen),
            "row": torch.tensor(chosen),
        }
    count = min(run.train.gradient_accumulation_steps, 2 * processes)
    return Rehearsal([batch] * count, held_out)


def _longest(lengths: Any, count: int) -> list[int]:
    return [int(index) for index in np.argsort(-lengths, kind="stable")[:count]]


def _padded_tokens(rows: Sequence[Sequence[int]], lengths: Any) -> int:
    return len(rows) * max(sum(int(lengths[i]) for i in row) for row in rows)
