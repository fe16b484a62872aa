"""Products with a frozen linear map, whose weight on a CPU comes a part of its rows at a time.

With `x` (N, in), `W` (out, in), dL/dy = `g` (N, out), and rows R of W one part after another:

    y[:, R] = x W[R]^T + bias[R]          dx = sum over R of g[:, R] W[R]

A weight in 4 bits is rebuilt for each product. Where it takes more than 32 MiB (in fp32, of a model
of a billion weights) glibc asks the system for its memory anew each time, which hands it out zeroed
page by page (`base/host_memory.py`). A part of `PART_BYTES` finds memory that was left, and no
whole weight is ever held; larger parts leave holes (`scripts/benchmark_step.py --part
1b-equal-1x512` weighs such a step). 16-bit weights come whole: a sum over parts would be rounded
once a part. So do those on other devices, whose allocators keep memory.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from qlora_trainer.base.quantize import (
    SCALE_BLOCK_SIZE,
    NF4Tensors,
    dequantize_absmax,
    dequantize_nf4,
)

if TYPE_CHECKING:
    from qlora_trainer.base.nf4 import NF4Linear

PART_BYTES = 8 * 2**20


def dense_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """Weight (out, in) of a linear-like base in `dtype`; made anew where it is held in 4 bits."""
    if hasattr(base, "dense_weight"):
        return base.dense_weight(dtype)
    weight = base.weight.detach().to(dtype)
    return weight.t() if isinstance(base, Conv1D) else weight


def dense_bias(base: Any, dtype: torch.dtype) -> Tensor | None:
    """Bias (out) of a linear-like base in `dtype`, or None."""
    return None if base.bias is None else base.bias.detach().to(dtype)


def as_output(y: Tensor, shape: Sequence[int]) -> Tensor:
    """`y` in another shape, as an autograd function's output that callers may add to in place.

    To autograd it is no view; views that such a function returns may not be changed (Falcon adds
    its attention's output to its MLP's).
    """
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y, list(shape))
    return shaped


def frozen_product(base: Any, x: Tensor) -> Tensor:
    """`x W^T + bias`, no gradient recorded. (N, in) -> (N, out) in the dtype of `x`."""
    bias = dense_bias(base, x.dtype)
    parts = row_parts(base, x.dtype)
    if parts is None:
        return F.linear(x, dense_weight(base, x.dtype), bias)
    y = x.new_empty(x.shape[0], base.out_features)
    held = _with_scales(base)
    for rows in parts:
        weight = dense_rows(base, rows.start, rows.stop, x.dtype, held).t()
        if bias is None:
            torch.mm(x, weight, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, weight, out=y[:, rows])
        del weight  # before the next one is made
    return y


def frozen_input_gradient(base: Any, g: Tensor, into: Tensor | None = None) -> Tensor:
    """`g W`, (N, out) -> (N, in); added to `into` in place where that is given."""
    parts = row_parts(base, g.dtype)
    if parts is None:
        weight = dense_weight(base, g.dtype)
        return g @ weight if into is None else into.addmm_(g, weight)
    held = _with_scales(base)
    for rows in parts:
        weight = dense_rows(base, rows.start, rows.stop, g.dtype, held)
        into = g[:, rows] @ weight if into is None else into.addmm_(g[:, rows], weight)
        del weight  # before the next one is made
    assert into is not None
    return into


def row_parts(base: Any, dtype: torch.dtype) -> Iterator[slice] | None:
    """Rows of the parts a weight comes in, of a weightless one the first two; None: it is whole."""
    if dtype != torch.float32 or getattr(base, "codes", None) is None:
        return None
    row_bytes = base.in_features * dtype.itemsize
    on_cpu = base.codes.device.type == "cpu" if base.on_cpu is None else base.on_cpu
    if not on_cpu or base.out_features * row_bytes <= PART_BYTES:
        return None
    unit = row_unit(base)
    step = max(1, PART_BYTES // (row_bytes * unit)) * unit
    starts = range(0, base.out_features, step)
    if base.codes.is_meta:  # each takes and frees what the one before it did
        starts = starts[:2]
    return (slice(first, min(first + step, base.out_features)) for first in starts)


def row_unit(layer: "NF4Linear") -> int:
    """Rows of which whole multiples begin where codes and scales begin as well."""
    whole = layer.block_size * (SCALE_BLOCK_SIZE if layer.double_quant else 1)
    return whole // math.gcd(whole, layer.in_features)


def _with_scales(layer: "NF4Linear") -> NF4Tensors:
    """Its codes with the scale of every block in fp32: made once, and not for each part."""
    return NF4Tensors(layer.codes, dequantize_absmax(layer.tensors), None, None, None)


def dense_rows(
    layer: "NF4Linear", first: int, last: int, dtype: torch.dtype, held: NF4Tensors | None = None
) -> Tensor:
    """Rows of a weight in NF4. -> (last - first, in).

    Args:
        layer: Holds the weight.
        first: A multiple of `row_unit`.
        last: The row after the last.
        dtype: Of the result.
        held: What to read in place of `layer.tensors`.
    """
    held = layer.tensors if held is None else held
    begin, end = first * layer.in_features, last * layer.in_features

    def part(tensor: Tensor, elements: int) -> Tensor:
        return tensor[begin // elements : -(-end // elements)]

    of_scales = layer.block_size * SCALE_BLOCK_SIZE
    tensors = NF4Tensors(
        part(held.codes, 2),
        part(held.absmax, layer.block_size),
        None if held.absmax_scale is None else part(held.absmax_scale, of_scales),
        held.absmax_code,
        held.absmax_offset,
    )
    return dequantize_nf4(tensors, (last - first, layer.in_features), layer.block_size, dtype)
