"""Carrying out a plan: one tensor at a time from the base's files to the export's.

`original` adds the update to the base's own weights; `dequantized` to what training saw of them,
made again with the same NF4 code. A tensor no adapter touches is only cast, or copied as it is.

A tensor is cut into pieces of some megabytes, and threads share the pieces: each reads one, merges
it block by block and writes it to its place. What the cast did is summed in the order of the rows,
so that neither files nor figures depend on how many threads there are. In memory at any time: a
piece a thread, and for `dequantized` the weight at hand and the codes of those still being written.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.errors import UserError
from qlora_trainer.export.blocks import (
    Buffers,
    CastLoss,
    check_range,
    merge_rows,
    raise_for_range,
    torch_threads,
)
from qlora_trainer.export.checkpoint import MappedCheckpoint
from qlora_trainer.export.choices import Onto
from qlora_trainer.export.plan import Plan, PlannedTensor
from qlora_trainer.export.rows import (
    Quantization,
    Rows,
    StoredRows,
    rows_of,
    rows_seen_in_training,
)
from qlora_trainer.export.shards import DEFAULT_SHARD_BYTES, Announced, ShardWriter

_PIECE_BLOCKS = 4  # 4 MiB in 16 bit: large enough for the system to read and write it well
_MOST_THREADS = 4

Progress = Callable[[str, int, int], None]  # tensor, bytes written, bytes in all


@dataclass
class MergeFigures:
    """What a merge did.

    Attributes:
        tensors: Tensors written.
        adapted: Weights that got a low-rank update.
        replaced: Tensors the adapter brought whole.
        unchanged: Adapted weights whose written values are the base's: the update was lost.
        written_bytes: Bytes of tensors.
        cast_errors: Adapted weight -> norm of the rounding error over the norm of its update.
        own_cast_errors: Other tensor that did lose something -> norm of that over its own norm.
    """

    tensors: int = 0
    adapted: int = 0
    replaced: int = 0
    unchanged: list[str] = field(default_factory=list)
    written_bytes: int = 0
    cast_errors: dict[str, float] = field(default_factory=dict)
    own_cast_errors: dict[str, float] = field(default_factory=dict)


def write_merged(
    plan: Plan,
    base: MappedCheckpoint,
    folder: Path,
    *,
    onto: Onto,
    quantization: Quantization,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> MergeFigures:
    """Write the merged weights and their index into a folder.

    Raises:
        UserError: Values are not finite or beyond the dtype's range, or nothing was changed.
    """
    announced = [Announced(t.name, t.dtype, t.shape) for t in plan.tensors]
    total = sum(tensor.size_bytes for tensor in announced)
    figures, faults, loss = MergeFigures(), [], CastLoss()
    threads, buffers = torch.get_num_threads(), Buffers()
    with (
        torch_threads(1),
        StoredRows(buffers) as files,
        ShardWriter(folder, announced, max_shard_bytes) as writer,
        contextlib.closing(
            _done_in_order(
                _pieces(plan, _Reading(base, files, onto, quantization, threads)),
                lambda piece: piece.write(writer, buffers),
                threads,
            )
        ) as written,
    ):
        for piece, lost in written:
            loss.add(lost)
            if not piece.is_last:
                continue
            fault = _note(piece.tensor, loss, base, figures)
            faults += [fault] if fault is not None else []
            if progress is not None:
                progress(piece.tensor.name, figures.written_bytes, total)
            loss = CastLoss()
    raise_for_range(faults, plan.dtype)
    if not figures.replaced and len(figures.unchanged) == figures.adapted:
        raise UserError(
            f"the merge changed nothing: none of {figures.adapted} adapted weights differs from "
            "the base's; the adapter is untrained, or its update is lost in rounding to "
            f"{plan.dtype} (try --dtype fp32)"
        )
    return figures


@dataclass(frozen=True)
class _Reading:
    """Where the base's values come from, and in which form."""

    base: MappedCheckpoint
    files: StoredRows
    onto: Onto
    quantization: Quantization
    threads: int


@dataclass(frozen=True)
class _Piece:
    """Rows of a tensor that one thread merges and writes."""

    tensor: PlannedTensor
    rows: Rows
    factors: tuple[Tensor, Tensor] | None  # of the whole tensor's update
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends with it."""
        return self.stop == self.rows.count

    @torch.no_grad()
    def write(self, writer: ShardWriter, buffers: Buffers) -> CastLoss:
        """Write it; -> what the cast did to its values."""
        loss, tensor = CastLoss(), self.tensor
        values = self.rows.between(self.start, self.stop)
        if tensor.dtype.is_floating_point:
            values = merge_rows(values, self.factors, tensor.dtype, loss, buffers, start=self.start)
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        writer.write(tensor.name, self.start * row_bytes, values)
        return loss


def _pieces(plan: Plan, reading: _Reading) -> Iterator[_Piece]:
    """All tensors in order, piece by piece; one without rows is a piece as well."""
    for tensor in plan.tensors:
        rows = _rows(tensor, reading)
        factors = None if tensor.update is None else tensor.update.factors()
        step = rows.step * _PIECE_BLOCKS
        for start in range(0, max(1, rows.count), step):
            yield _Piece(tensor, rows, factors, start, min(start + step, rows.count))


def _done_in_order(
    pieces: Iterator[_Piece], work: Callable[[_Piece], CastLoss], threads: int
) -> Generator[tuple[_Piece, CastLoss], None, None]:
    """Have pieces done by several threads, and hand them on in order when they are."""
    threads = min(2 * threads, _MOST_THREADS)  # while half of them wait for the disk
    waiting: deque[tuple[_Piece, Future[CastLoss]]] = deque()
    # How many threads share one operation is each thread's own setting.
    pool = ThreadPoolExecutor(threads, "merge", torch.set_num_threads, (1,))
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(work, piece)))
            while len(waiting) > 2 * threads:
                first, loss = waiting.popleft()
                yield first, loss.result()
        while waiting:
            first, loss = waiting.popleft()
            yield first, loss.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _note(
    tensor: PlannedTensor, loss: CastLoss, base: MappedCheckpoint, figures: MergeFigures
) -> str | None:
    """Count a tensor that was written; -> what is wrong with its values, if anything."""
    figures.tensors += 1
    figures.written_bytes += math.prod(tensor.shape) * tensor.dtype.itemsize
    if tensor.replacement is not None and _differs(tensor, base):
        figures.replaced += 1
    if not tensor.dtype.is_floating_point:
        return None
    if tensor.update is not None:
        figures.adapted += 1
        norm = tensor.update.norm()
        if not loss.changed:
            figures.unchanged.append(tensor.name)
        if norm > 0:
            figures.cast_errors[tensor.name] = math.sqrt(loss.squared_error) / norm
    elif loss.squared_error:
        relative = math.sqrt(loss.squared_error / max(loss.squared_norm, loss.squared_error))
        figures.own_cast_errors[tensor.name] = relative
    return check_range(tensor.name, loss, tensor.dtype)


def _differs(tensor: PlannedTensor, base: MappedCheckpoint) -> bool:
    """Whether what the adapter brings is new; PEFT repeats some of the base's weights."""
    assert tensor.replacement is not None
    if tensor.source is None or tensor.source.shape != tensor.shape:
        return True
    own = base.read(tensor.source)
    return not torch.equal(tensor.replacement.to(own.dtype), own)


def _rows(tensor: PlannedTensor, reading: _Reading) -> Rows:
    """The tensor without its update."""
    if tensor.replacement is not None:
        return rows_of(tensor.replacement)
    assert tensor.source is not None
    if tensor.source.packed:
        return rows_of(reading.base.read(tensor.source))
    if reading.onto == "dequantized" and tensor.quantized:
        with torch_threads(reading.threads):
            return rows_seen_in_training(
                reading.files.whole(tensor.source), reading.quantization,
                transposed=tensor.transposed,
            )  # fmt: skip
    return reading.files.of(tensor.source)
