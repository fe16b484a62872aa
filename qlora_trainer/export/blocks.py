"""The arithmetic of a merge, in blocks that stay in cache: sum in float32, cast once, measure.

Each block is one thread's work: split among several, operations as short as these wait for each
other far longer than they work (up to a hundred times where other programs use the cores too).
`merge` gives different blocks to different threads instead.

For rows i..j of a weight, `W[i:j] + left[i:j] @ right` is made in float32, cast to the export's
dtype and written; nothing larger than a block exists, whatever the tensor's size. The rounding
error of the cast is summed on the way, and it is where a value that is not finite, or too large for
float16, shows: only then is the block looked at more closely.
"""

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_trainer.errors import UserError

# 2 MiB in float32: about what a core's caches hold. Blocks of a quarter cost a quarter more time:
# the product lays its right factor out anew for each, and threads wait for the interpreter more.
BLOCK_ELEMENTS = 2**19


@dataclass
class CastLoss:
    """What writing one tensor in the export's dtype did to it.

    Attributes:
        squared_error: Sum of squared differences, float32 value minus written value.
        squared_norm: Sum of squares of what was to be written; only without an update, whose own
            norm is the better measure.
        changed: Whether any written value differs from the base's, cast alike.
        overflows: Values beyond the dtype's range.
        not_finite: Values that were NaN or infinite before the cast.
        largest: Largest finite magnitude among the blocks with such values.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    changed: bool = False
    overflows: int = 0
    not_finite: int = 0
    largest: float = 0.0

    def add(self, other: "CastLoss") -> None:
        """Count the loss of further rows of the same tensor."""
        self.squared_error += other.squared_error
        self.squared_norm += other.squared_norm
        self.changed |= other.changed
        self.overflows += other.overflows
        self.not_finite += other.not_finite
        self.largest = max(self.largest, other.largest)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch's operations use so many threads inside the block, and as many as before after."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def row_step(shape: tuple[int, ...], multiple: int = 1) -> int:
    """Rows a block takes so that it has about `BLOCK_ELEMENTS`, and whole quantization blocks.

    Args:
        shape: Of the tensor; (rows, columns).
        multiple: Elements of a block must be a multiple of this.
    """
    columns = max(1, math.prod(shape[1:]))
    unit = multiple // math.gcd(columns, multiple)
    return max(unit, BLOCK_ELEMENTS // columns // unit * unit)


class Buffers(threading.local):
    """Memory each thread uses again and again: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def empty(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with anything in it, gone when this thread asks again for the same use."""
        size = math.prod(shape) * dtype.itemsize
        held = self._held.get(use)
        if held is None or len(held) < size:
            held = self._held[use] = torch.empty(size, dtype=torch.uint8)
        return held[:size].view(dtype).view(shape)


def merge_rows(
    rows: Tensor,
    factors: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
    loss: CastLoss,
    buffers: Buffers,
    *,
    start: int = 0,
) -> Tensor:
    """Some rows of a weight as they are written.

    Args:
        rows: Of the base weight, (n, ...), in any float dtype.
        factors: Of what is added, (all rows, r) and (r, columns) as `LowRank.factors` gives them;
            or nothing.
        dtype: To write in.
        loss: Filled in on the way.
        buffers: What comes back lies in them, or is `rows` where nothing is to be done.
        start: Where in the weight the first of these rows stands.
    """
    step = row_step(tuple(rows.shape))
    if factors is None and rows.dtype == dtype:
        for block in rows.split(step):
            if not _all_finite(block):
                _note_bad_values(block, block, loss)
        return rows
    flat = rows.reshape(len(rows), math.prod(rows.shape[1:]))
    merged = buffers.empty("merged", tuple(flat.shape), dtype)
    for first in range(0, len(flat), step):
        block, written = flat[first : first + step], merged[first : first + step]
        total = buffers.empty("total", tuple(block.shape), torch.float32).copy_(block)
        if factors is not None:
            total.addmm_(factors[0][start + first :][: len(block)], factors[1])
        written.copy_(total)
        _measure(total, written, buffers, loss, of_itself=factors is None)
        if factors is not None and not loss.changed:
            loss.changed = not torch.equal(written, block.to(dtype))
    return merged.view(rows.shape)


def _all_finite(block: Tensor) -> bool:
    """Whether every value is finite; one vectorised pass, where `isfinite` takes ten times that."""
    if block.numel() == 0:
        return True
    least, most = torch.aminmax(block)  # NaN if any value is
    return math.isfinite(float(least)) and math.isfinite(float(most))


def _measure(
    total: Tensor, written: Tensor, buffers: Buffers, loss: CastLoss, *, of_itself: bool
) -> None:
    if written.dtype == total.dtype:
        healthy, squared = _all_finite(total), 0.0
    else:
        # Widened first: torch's subtraction of two dtypes is ten times slower.
        error = buffers.empty("error", tuple(total.shape), torch.float32)
        error.copy_(written).sub_(total)
        flat = error.view(-1)
        squared = float(torch.dot(flat, flat))  # not finite if any value, read or written, is
        healthy = math.isfinite(squared)
    if not healthy:
        _note_bad_values(total, written, loss)
        return
    loss.squared_error += squared
    if of_itself:
        flat = total.view(-1)
        loss.squared_norm += float(torch.dot(flat, flat))


def _note_bad_values(total: Tensor, written: Tensor, loss: CastLoss) -> None:
    finite = total.isfinite()
    loss.not_finite += int((~finite).sum())
    loss.overflows += int((finite & ~written.isfinite()).sum())
    loss.largest = max(loss.largest, float(total[finite].abs().max()) if finite.any() else 0.0)


def check_range(name: str, loss: CastLoss, dtype: torch.dtype) -> str | None:
    """The fault of a tensor that could not be written as it is, or None."""
    if loss.not_finite:
        return f"{name}: {loss.not_finite} values are NaN or infinite"
    if loss.overflows:
        limit = torch.finfo(dtype).max
        return (
            f"{name}: {loss.overflows} values beyond {limit:g}, the largest of {_short(dtype)}; "
            f"the largest is {loss.largest:g}"
        )
    return None


def raise_for_range(faults: list[str], dtype: torch.dtype) -> None:
    """Refuse an export whose values do not survive its dtype.

    Raises:
        UserError: There are faults.
    """
    if faults:
        bf16 = "--format merged --dtype bf16 has fp32's range"
        way_out = bf16 if dtype == torch.float16 else "mend the weights"
        raise UserError.from_faults(
            f"the merged weights cannot be written in {_short(dtype)}; {way_out}", faults
        )


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
