"""The rows of a run on their way: training windows by step, passes over the held-out rows.

Which rows go together says `data/batches.py`, how they become tensors the task's encoder. Reads the
configuration; what it calls takes plain values.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch

from qlora_trainer.config.settings import RunConfig
from qlora_trainer.data.batches import BatchPlan, collate, row_layout
from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.data.encode import Encoder
from qlora_trainer.data.rows import Augmenting, RowEncoder
from qlora_trainer.tasks.task import Batch
from qlora_trainer.training.open_data import RunData
from qlora_trainer.training.processes import ALONE, Processes
from qlora_trainer.training.windows import Windows


def make_windows(run: RunConfig, data: RunData, attention: str | None) -> Windows:
    """The training data by step."""
    plan = BatchPlan(
        data.train.lengths,
        micro_batch_size=run.train.micro_batch_size,
        seed=run.train.seed,
        packing=run.data.packing,
        capacity=run.data.max_seq_len,
        order="by_length" if run.data.group_by_length and not run.data.packing else "random",
        mega_batch_mult=run.data.mega_batch_mult,
    )
    layout = row_layout(attention)
    augmenting = data.encoder if isinstance(data.encoder, Augmenting) else None

    def make(number: int) -> Batch:
        rows = plan.micro_batch(number)
        if run.data.packing:
            return collate(data.train, rows, pad_id=data.pad_id, packed=True, layout=layout)
        single = [index for row in rows for index in row]
        if augmenting is not None:
            epoch = number // len(plan)
            return augmenting.collate_augmented(
                data.train, single, seed=run.train.seed, epoch=epoch
            )
        return collate_rows(run, data, data.train, single)

    return Windows.numbered(len(plan), make, run.train.gradient_accumulation_steps)


def eval_batches(
    run: RunConfig, data: RunData, processes: Processes = ALONE
) -> Callable[[], Iterator[Batch]] | None:
    """Begin a pass over this process' share of the held-out rows.

    Like lengths stand together; every row is in one batch of one process.
    """
    held_out = data.held_out
    if held_out is None:
        return None
    size = run.evaluation.micro_batch_size or run.train.micro_batch_size
    plan = BatchPlan(
        held_out.lengths, micro_batch_size=size, order="by_length",
        mega_batch_mult=run.data.mega_batch_mult,
    )  # fmt: skip

    def begin() -> Iterator[Batch]:
        for number in processes.share(len(plan)):
            rows = [index for row in plan.micro_batch(number) for index in row]
            yield {**collate_rows(run, data, held_out, rows), "row": torch.tensor(rows)}

    return begin


def collate_rows(
    run: RunConfig, data: RunData, dataset: EncodedDataset, rows: Sequence[int]
) -> Batch:
    """A batch with one example a row."""
    if isinstance(data.encoder, Encoder):
        return collate(dataset, [[index] for index in rows], pad_id=data.pad_id)
    return cast(RowEncoder, data.encoder).collate(dataset, rows)


def references(run: RunConfig, data: RunData) -> Callable[[int], Any] | None:
    """What the prediction for a held-out row is scored against; None where nothing is scored."""
    held_out, encoder = data.held_out, data.encoder
    if isinstance(encoder, Encoder) or held_out is None:
        return None
    return lambda index: cast(RowEncoder, encoder).reference(held_out, index)
