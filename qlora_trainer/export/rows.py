"""The rows of a tensor before its update: the base's own, or what training saw of them.

Any rows can be had without the others, by any thread, so that a merge works block by block. Only
quantizing again looks at the whole weight: the 8-bit scales of its blocks depend on each other.

They are read rather than mapped: where base and export together are larger than memory, taking
mapped pages back costs the system twice the time of the whole merge.
"""

import errno
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.base.quantize import (
    QUANTIZABLE_DTYPES,
    NF4Tensors,
    dequantize_absmax,
    dequantize_nf4,
    quantize_nf4,
)
from qlora_trainer.export.blocks import Buffers, row_step
from qlora_trainer.export.checkpoint import StoredTensor


@dataclass(frozen=True)
class Quantization:
    """How training held the base's linear weights: block size, and scales in 8 bits or not."""

    block_size: int = 64
    double_quant: bool = True


@dataclass(frozen=True)
class Rows:
    """A tensor without its update.

    Attributes:
        count: How many rows it has.
        step: Whole rows (and whole quantization blocks) of about a block of `blocks`.
        between: Rows from one number up to another, in any float dtype (or the tensor's own); gone
            when the same thread asks for the next.
    """

    count: int
    step: int
    between: Callable[[int, int], Tensor]


class StoredRows:
    """Reads tensors from a checkpoint's files, each thread with a handle of its own.

    Use it as a context manager: it closes the files.

    Args:
        buffers: Where rows are read to.
    """

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._own = threading.local()
        self._opened: list[FileIO] = []

    def __enter__(self) -> "StoredRows":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._opened:
            file.close()

    def of(self, stored: StoredTensor) -> Rows:
        """Of a tensor that is not packed; a single number counts as one row."""
        shape = stored.shape or (1,)
        row_bytes = math.prod(shape[1:]) * stored.dtype.itemsize

        def between(start: int, stop: int) -> Tensor:
            rows = self._buffers.empty("read", (stop - start, *shape[1:]), stored.dtype)
            self._read(stored, start * row_bytes, rows)
            return rows

        return Rows(shape[0], row_step(shape), between)

    def whole(self, stored: StoredTensor) -> Tensor:
        """A tensor in memory of its own."""
        values = torch.empty(stored.shape, dtype=stored.dtype)
        self._read(stored, 0, values)
        return values

    def _read(self, stored: StoredTensor, offset: int, into: Tensor) -> None:
        """Fill a tensor from some byte of a stored one on."""
        files: dict[Path, FileIO] = self._own.__dict__.setdefault("files", {})
        file = files.get(stored.file)
        if file is None:
            file = files[stored.file] = stored.file.open("rb", buffering=0)
            self._opened.append(file)
        file.seek(stored.start + offset)
        flat: Any = into.view(-1).view(torch.uint8).numpy()
        left = memoryview(flat)
        while len(left):
            count = file.readinto(left)
            if not count:
                raise OSError(errno.EIO, "ended while it was read", str(stored.file))
            left = left[count:]


def rows_of(values: Tensor) -> Rows:
    """Of a tensor that is there; a single number counts as one row."""
    values = values.view(1) if values.dim() == 0 else values
    return Rows(
        values.shape[0], row_step(tuple(values.shape)), lambda start, stop: values[start:stop]
    )


def rows_seen_in_training(stored: Tensor, quantization: Quantization, *, transposed: bool) -> Rows:
    """Of a weight as its NF4 codes stand for it, in float32.

    Args:
        stored: The base's own values.
        quantization: As in training.
        transposed: It is stored as (in, out), and was quantized as (out, in).
    """
    seen = stored.t().contiguous() if transposed else stored
    try:
        nf4 = _quantized(seen, quantization)
    except ValueError:  # not finite: the blocks are written as they are and counted there
        return rows_of(stored)
    rows = _dequantized(nf4, tuple(seen.shape), quantization.block_size)
    return rows_of(rows.between(0, rows.count).t()) if transposed else rows


def _quantized(weight: Tensor, quantization: Quantization) -> NF4Tensors:
    """The codes training held of a weight (out, in)."""
    if weight.dtype not in QUANTIZABLE_DTYPES:
        weight = weight.float()
    return quantize_nf4(
        weight, block_size=quantization.block_size, double_quant=quantization.double_quant
    )


def _dequantized(nf4: NF4Tensors, shape: tuple[int, ...], block_size: int) -> Rows:
    """What training saw of a weight (out, in), from its codes."""
    absmax = dequantize_absmax(nf4)  # fp32 (blocks,)
    count, columns = shape

    def between(start: int, stop: int) -> Tensor:
        first, last = start * columns, stop * columns
        part = NF4Tensors(nf4.codes[first // 2 : -(-last // 2)],
                          absmax[first // block_size : -(-last // block_size)])  # fmt: skip
        return dequantize_nf4(part, (stop - start, columns), block_size, torch.float32)

    return Rows(count, row_step(shape, math.lcm(block_size, 2)), between)
