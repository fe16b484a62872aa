"""Rows to stored examples: shape, encode, fit to length, write; every fault kept, none fatal alone.

Rows go through in small batches (one tokenizer call each), so memory does not grow with the data.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_trainer.data.encode import Example
from qlora_trainer.data.faults import FaultLog, RowError, TooManyFaults
from qlora_trainer.data.formats import FORMATS, rename
from qlora_trainer.data.length import LengthPolicy
from qlora_trainer.data.read import OpenedSource, no_rows
from qlora_trainer.data.rows import RecordEncoder
from qlora_trainer.data.store import StoreWriter
from qlora_trainer.data.text_lines import Row
from qlora_trainer.errors import UserError

ROWS_PER_CALL = 256  # rows per tokenizer call
ROWS_RECOGNISED = 100  # rows looked at to tell the format


def encode_into(
    folder: Path,
    opened: Sequence[OpenedSource],
    encoder: RecordEncoder,
    policy: LengthPolicy,
    progress: Callable[[int], None] | None,
) -> None:
    """Write the examples of all sources into a store.

    Raises:
        UserError: All faults of all sources in one message. Nothing is stored then.
    """
    faults = FaultLog()
    per_source: list[dict[str, Any]] = []
    done = 0
    with StoreWriter(folder, encoder.columns) as writer:
        try:
            for index, item in enumerate(opened):
                tally = _Tally(item.source.path)
                for rows in _encoded(item, encoder, tally, faults):
                    for row, examples in rows:
                        for example in examples:
                            kept = policy.fit(example, row.where, faults)
                            if kept is not None:
                                writer.add(kept, row.where, index)
                                tally.examples += 1
                    if progress is not None:
                        progress(done + tally.rows)
                done += tally.rows
                if tally.rows == 0 and not faults.faults:
                    faults.add(no_rows(item))
                per_source.append({**asdict(tally), "identity": item.identity})
        except TooManyFaults:
            pass
        faults.raise_if_any("the data cannot be trained on")
        policy.check()
        if writer.count == 0:
            raise UserError(
                "data.over_length = drop: every row is longer than data.max_seq_len = "
                f"{policy.max_seq_len}; "
                f"the longest has {policy.longest} tokens"
            )
        writer.finish({"sources": per_source, **policy.counts()})


@dataclass
class _Tally:
    path: str
    format: str = ""
    rows: int = 0
    examples: int = 0
    split_chats: int = 0
    merged_joins: int = 0
    control_rows: int = 0


def _encoded(
    item: OpenedSource, encoder: RecordEncoder, tally: _Tally, faults: FaultLog
) -> Iterator[list[tuple[Row, list[Example]]]]:
    """Batches of rows with their examples; rows that are wrong go to `faults`."""
    rows = item.rows(faults)
    head = list(itertools.islice(rows, ROWS_RECOGNISED))
    if not head:
        return
    columns = item.source.columns
    tally.format = _format_of(item, head, encoder)
    for batch in _batched(itertools.chain(head, rows), ROWS_PER_CALL):
        tally.rows += len(batch)
        records = [rename(row.record, columns) for row in batch]
        encoded: list[tuple[Row, list[Example]]] = []
        results = encoder.encode_rows(records, tally.format)
        for row, result in zip(batch, results, strict=True):
            if isinstance(result, RowError):
                faults.add(result.at(row.where))
                continue
            tally.split_chats += len(result) > 1
            tally.merged_joins += any(example.merged_join for example in result)
            tally.control_rows += any(example.control_tokens for example in result)
            encoded.append((row, result))
        yield encoded


def _format_of(item: OpenedSource, head: Sequence[Row], encoder: RecordEncoder) -> str:
    source = item.source
    if source.format == "auto":
        try:
            return encoder.recognise((row.record for row in head), source.columns)
        except UserError as error:
            raise UserError(f"data source {source.path}: {error}") from error
    if source.format not in FORMATS:
        raise UserError(
            f"format = {source.format!r} of data source {source.path}: must be auto or one of "
            f"{', '.join(FORMATS)}"
        )
    return source.format


def _batched(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch
