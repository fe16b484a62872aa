"""Carrying out a plan: one tensor at a time from the base's files to the export's.

`original` adds the update to the base's own weights; `dequantized` to what training saw of them,
made again with the same NF4 code. A tensor no adapter touches is only cast, or copied as it is. In
memory at any time: a block of rows, and for `dequantized` the codes of the tensor at hand.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.base.quantize import (
    QUANTIZABLE_DTYPES,
    NF4Tensors,
    dequantize_absmax,
    dequantize_nf4,
    quantize_nf4,
)
from qlora_trainer.errors import UserError
from qlora_trainer.export.blocks import (
    CastLoss,
    check_range,
    merged_blocks,
    raise_for_range,
    row_step,
    torch_threads,
)
from qlora_trainer.export.checkpoint import MappedCheckpoint
from qlora_trainer.export.choices import Onto
from qlora_trainer.export.plan import Plan, PlannedTensor
from qlora_trainer.export.shards import DEFAULT_SHARD_BYTES, Announced, ShardWriter

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


@dataclass(frozen=True)
class Quantization:
    """How training held the base's linear weights: block size, and scales in 8 bits or not."""

    block_size: int = 64
    double_quant: bool = True


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
    figures, faults = MergeFigures(), []
    reading = _Reading(base, onto, quantization, torch.get_num_threads())
    with (
        torch.no_grad(),
        torch_threads(1),
        ShardWriter(folder, announced, max_shard_bytes) as writer,
    ):
        for tensor, size in zip(plan.tensors, announced, strict=True):
            writer.begin(tensor.name)
            fault = _write_one(tensor, reading, writer, figures)
            faults += [fault] if fault is not None else []
            figures.tensors += 1
            figures.written_bytes += size.size_bytes
            if progress is not None:
                progress(tensor.name, figures.written_bytes, total)
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
    onto: Onto
    quantization: Quantization
    threads: int  # for quantizing, which splits its work in pieces of its own


def _write_one(
    tensor: PlannedTensor, reading: _Reading, writer: ShardWriter, figures: MergeFigures
) -> str | None:
    """Write one tensor; -> what is wrong with its values, if anything."""
    if tensor.replacement is not None and _differs(tensor, reading.base):
        figures.replaced += 1
    rows = _rows(tensor, reading)
    if not tensor.dtype.is_floating_point:
        for block in rows:
            writer.write(block)
        return None
    loss = CastLoss()
    for block in merged_blocks(rows, tensor.update, tensor.dtype, loss):
        writer.write(block)
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


def _rows(tensor: PlannedTensor, reading: _Reading) -> Iterator[Tensor]:
    """The tensor without its update, in blocks of rows."""
    if tensor.replacement is not None:
        return _split(tensor.replacement)
    assert tensor.source is not None
    if tensor.source.packed:
        return _split(reading.base.read(tensor.source))
    stored = reading.base.view(tensor.source)
    if reading.onto == "dequantized" and tensor.quantized:
        seen = stored.t().contiguous() if tensor.transposed else stored
        try:
            with torch_threads(reading.threads):
                nf4 = _quantized(seen, reading.quantization)
        except ValueError:  # not finite: the block is written as it is and counted there
            return _split(stored)
        rows = _dequantized_rows(nf4, tuple(seen.shape), reading.quantization.block_size)
        return _split(torch.cat(list(rows)).t()) if tensor.transposed else rows
    return _split(stored)


def _split(values: Tensor) -> Iterator[Tensor]:
    if values.dim() == 0:
        yield values.view(1)
        return
    step = row_step(tuple(values.shape))
    for start in range(0, values.shape[0], step):
        yield values[start : start + step]


def _quantized(weight: Tensor, quantization: Quantization) -> NF4Tensors:
    """The codes training held of a weight (out, in)."""
    if weight.dtype not in QUANTIZABLE_DTYPES:
        weight = weight.float()
    return quantize_nf4(
        weight, block_size=quantization.block_size, double_quant=quantization.double_quant
    )


def _dequantized_rows(nf4: NF4Tensors, shape: tuple[int, ...], block_size: int) -> Iterator[Tensor]:
    """What training saw of a weight (out, in), from its codes, in float32."""
    absmax = dequantize_absmax(nf4)  # fp32 (blocks,)
    count, columns = shape
    step = row_step(shape, math.lcm(block_size, 2))
    for start in range(0, count, step):
        stop = min(start + step, count)
        first, last = start * columns, stop * columns
        part = NF4Tensors(nf4.codes[first // 2 : -(-last // 2)],
                          absmax[first // block_size : -(-last // block_size)])  # fmt: skip
        yield dequantize_nf4(part, (stop - start, columns), block_size, torch.float32)
