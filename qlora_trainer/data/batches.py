"""Which examples stand in which micro-batch, and the tensors of one.

The order is a pure function of (seed, epoch). Every example is in exactly one row of one
micro-batch per epoch, and every epoch has the same number of micro-batches, so micro-batch number n
of a run is known without going through those before it: to resume is to go on at n.

    B rows, T tokens per row (the longest of the batch)
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.data.encode import IGNORED
from qlora_trainer.data.order import hash_order, mix
from qlora_trainer.data.packing import pack

ORDERS = ("random", "by_length", "given")

_Array = np.ndarray[Any, np.dtype[Any]]
Rows = list[list[int]]  # the rows of a micro-batch, each the examples in it


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The micro-batches of a run.

    Args:
        lengths: (N,) Tokens of every example.
        micro_batch_size: Rows per micro-batch; the last of an epoch may have fewer.
        seed: Decides all orders.
        packing: Several examples may share a row.
        capacity: Most tokens of a packed row (`max_seq_len`).
        order: `random`; `by_length` (rows of like length share a micro-batch, rows of one length
            change places per epoch, micro-batches come in random order: the least padding); `given`
            (as the data set has them, for evaluation).
        mega_batch_mult: `by_length` sorts within so many micro-batches; None: the whole epoch.
    """

    lengths: _Array
    micro_batch_size: int
    seed: int = 0
    packing: bool = False
    capacity: int | None = None
    order: str = "random"
    mega_batch_mult: int | None = None
    _groups: Rows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.order not in ORDERS:
            raise ValueError(f"micro_batch_size must be positive and order one of {ORDERS}")
        if self.packing and self.capacity is None:
            raise ValueError("packing needs a capacity")
        if not len(self.lengths):
            raise ValueError("there is no example to batch")
        # For packing: groups of ranks in descending length; equal lengths trade places per epoch.
        ranked = -np.sort(-np.asarray(self.lengths, np.int64))
        groups = pack(ranked, self.capacity) if self.packing and self.capacity else []
        object.__setattr__(self, "_groups", groups)
        object.__setattr__(self, "_epoch_rows", lru_cache(maxsize=2)(self._make_epoch))

    @property
    def rows_per_epoch(self) -> int:
        """Rows (packed or not) that one epoch has."""
        return len(self._groups) if self.packing else len(self.lengths)

    def __len__(self) -> int:
        """Micro-batches per epoch, the same for every epoch."""
        return -(-self.rows_per_epoch // self.micro_batch_size)

    def epoch(self, epoch: int) -> list[Rows]:
        """All micro-batches of an epoch, in order."""
        return [self.micro_batch(epoch * len(self) + index) for index in range(len(self))]

    def micro_batch(self, number: int) -> Rows:
        """Micro-batch `number` of the run, counted from 0 over all epochs."""
        epoch, index = divmod(number, len(self))
        rows, starts = self._epoch_rows(epoch)  # type: ignore[attr-defined]
        chosen: Rows = rows[starts[index] : starts[index + 1]]
        return chosen

    def largest_shape(self) -> tuple[int, int]:
        """Rows and tokens per row no micro-batch exceeds: what memory must be there for."""
        if not self.packing:
            longest = int(np.max(self.lengths))
        else:
            ranked = -np.sort(-np.asarray(self.lengths, np.int64))
            longest = max(int(ranked[group].sum()) for group in self._groups)
        return min(self.micro_batch_size, self.rows_per_epoch), longest

    def _make_epoch(self, epoch: int) -> tuple[Rows, list[int]]:
        """The rows of an epoch and where each micro-batch starts among them."""
        count, size = self.rows_per_epoch, self.micro_batch_size
        starts = [*range(0, count, size), count]
        rows = self._packed_rows(epoch) if self.packing else [[index] for index in range(count)]
        if self.order == "given":
            return rows, starts
        order = hash_order(count, self.seed, epoch, 1)
        if self.order == "random":
            return [rows[index] for index in order], starts
        totals = np.array([sum(int(self.lengths[i]) for i in row) for row in rows])
        window = count if self.mega_batch_mult is None else size * self.mega_batch_mult
        for start in range(0, count, window):
            part = order[start : start + window]
            order[start : start + window] = part[np.argsort(-totals[part], kind="stable")]
        batches = [order[a:b] for a, b in itertools.pairwise(starts)]
        shuffled = [batches[index] for index in hash_order(len(batches), self.seed, epoch, 2)]
        starts = np.cumsum([0, *(len(batch) for batch in shuffled)]).tolist()
        return [rows[index] for batch in shuffled for index in batch], starts

    def _packed_rows(self, epoch: int) -> Rows:
        lengths = np.asarray(self.lengths, np.int64)
        if self.order == "given":
            by_rank = np.argsort(-lengths, kind="stable")
        else:
            keys = mix(np.arange(len(lengths)), self.seed, epoch, 3)
            by_rank = np.lexsort((keys, -lengths))
        return [[int(by_rank[rank]) for rank in group] for group in self._groups]


_MASKED_ROWS = ("sdpa", "sdpa_expanded", "tiled", "eager", "flex_attention")


def row_layout(attention: str | None) -> str:
    """The layout of packed rows an attention implementation reads rightly.

    sdpa, eager and flex build their mask from restarting positions in every row. Flash attention
    does so only for a batch of one row (transformers' `_is_packed_sequence`), so for it, and for
    any implementation not known here, all rows are laid end to end in one.
    """
    return "rows" if attention in _MASKED_ROWS else "flat"


def collate(
    dataset: EncodedDataset,
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    packed: bool = False,
    layout: str = "rows",
    pad_to_multiple_of: int = 1,
) -> dict[str, torch.Tensor]:
    """Tensors of one micro-batch, padded on the right.

    Packed rows carry no attention mask: each example's positions restart at 0, and so do those of
    the padding, which thereby is an example of its own that nothing else sees. Rows that hold one
    example each get a mask where there is padding.

    Args:
        dataset: The examples.
        rows: The examples in each row, as `BatchPlan` gives them.
        pad_id: Fills `input_ids` up to T; its labels are -100.
        packed: Rows may hold several examples.
        layout: `rows`, or `flat`: packed rows end to end in one row (see `row_layout`).
        pad_to_multiple_of: T is rounded up to this.

    Returns:
        `input_ids`, `labels`, `position_ids` (B, T) int64, and, for unpacked rows of different
        lengths, `attention_mask` (B, T) int64. `labels` are not shifted; the first of every example
        is -100, so that a shift never joins two examples.
    """
    if packed and layout == "flat":
        rows = [[index for row in rows for index in row]]
    totals = [sum(int(dataset.lengths[index]) for index in row) for row in rows]
    width = -(-max(totals) // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    position_ids = np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        end = 0
        for index in row:
            ids = dataset.input_ids(index)
            start, end = end, end + len(ids)
            input_ids[number, start:end] = ids
            labels[number, start:end] = dataset.labels(index)
            labels[number, start] = IGNORED
            position_ids[number, start:end] = np.arange(len(ids))
        position_ids[number, end:] = np.arange(width - end) + (0 if packed else end)
    arrays = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    if not packed and min(totals) < width:
        arrays["attention_mask"] = (np.arange(width) < np.array(totals)[:, None]).astype(np.int64)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
