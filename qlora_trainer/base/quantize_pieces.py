"""The numbers of the nearest of 16 values, for whole blocks on a CPU, in pieces that stay in cache.

bitsandbytes' CPU kernel searches the 15 midpoints for each weight by bisection, over whole-tensor
fp32 copies. Here a code is the count of midpoints below the scaled weight: the same comparisons,
for many weights at one time. numpy makes them: its comparison into bytes is vectorised, which
torch's is not, and on one thread, so that pieces may go to several. Each of its calls must take far
longer than two threads need to hand Python's lock to each other; so a piece is as large as caches
allow.

Legend: N weights, a whole number of blocks.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

# Weights a thread handles at a time: a multiple of any block size.
_PIECE = 7 * 2**16
_MAX_WORKERS = 8
# Weights torch converts on the thread it is called from; from 32,768 on it would take several.
_CONVERTED = 7 * 2**12


def quantize_pieces(
    flat: Tensor, block_size: int, codes: Tensor, absmax: Tensor, midpoints: Tensor
) -> None:
    """Quantize whole blocks, by as many threads as torch would use.

    Args:
        flat: fp32, fp16 or bf16 (N,), contiguous.
        block_size: Weights per scale.
        codes: uint8 (N / 2,), the result: two codes a byte, the earlier in the high half.
        absmax: fp32 (N / block_size,), the result: each block's largest magnitude.
        midpoints: fp32 (15,), between neighbouring values, ascending.
    """
    whole = flat.numel()
    workers = max(1, min(torch.get_num_threads(), _MAX_WORKERS, -(-whole // _PIECE)))
    span = -(-whole // (workers * _PIECE)) * _PIECE

    def quantize_span(start: int) -> None:
        scratch = _Scratch(min(_PIECE, whole), midpoints)
        # A weight that is not finite is told of by whoever looks at the scales.
        with np.errstate(all="ignore"):
            for first in range(start, min(start + span, whole), _PIECE):
                last = min(first + _PIECE, whole)
                scratch.quantize(
                    flat[first:last], codes[first // 2 : last // 2].numpy(),
                    absmax[first // block_size : last // block_size].numpy(),
                )  # fmt: skip

    here, *elsewhere = range(0, whole, span)
    with ThreadPoolExecutor(max(1, len(elsewhere))) as pool:
        others = [pool.submit(quantize_span, start) for start in elsewhere]
        quantize_span(here)
        for other in others:
            other.result()


class _Scratch:
    """What one thread works in."""

    def __init__(self, weights: int, midpoints: Tensor) -> None:
        self._scaled = np.empty(weights, np.float32)
        self._magnitude = np.empty(weights, np.float32)
        self._above = np.empty(weights, np.bool_)
        self._count = np.empty(weights, np.uint8)
        self._midpoints = midpoints.numpy()

    def quantize(self, piece: Tensor, codes: np.ndarray, absmax: np.ndarray) -> None:
        """Quantize one piece, as `quantize_pieces` does all."""
        size, blocks = piece.numel(), absmax.size
        scaled, above, count = (part[:size] for part in (self._scaled, self._above, self._count))
        _widen(piece, scaled)
        magnitude = np.abs(scaled, out=self._magnitude[:size])
        np.max(magnitude.reshape(blocks, -1), axis=1, out=absmax)
        # bitsandbytes multiplies by the reciprocal; dividing would round differently. It also
        # clamps to [-1, 1], which no comparison below can see.
        factor = np.float32(1.0) / np.maximum(absmax, np.float32(1e-38))
        by_block = scaled.reshape(blocks, -1)
        np.multiply(by_block, factor[:, None], out=by_block)
        np.greater(scaled, self._midpoints[0], out=count.view(np.bool_))
        for midpoint in self._midpoints[1:]:
            np.greater(scaled, midpoint, out=above)
            np.add(count, above.view(np.uint8), out=count)
        pairs = count.view("<u2")  # the second code of each pair in the high byte
        np.copyto(codes, (pairs << 4) | (pairs >> 8), casting="unsafe")


def _widen(piece: Tensor, out: np.ndarray) -> None:
    """To fp32: bf16 by its bits, which are fp32's upper half."""
    if piece.dtype == torch.bfloat16:
        bits = out.view(np.uint32)
        np.copyto(bits, piece.view(torch.int16).numpy().view(np.uint16))
        np.left_shift(bits, 16, out=bits)
        return
    widened = torch.from_numpy(out)
    for into, part in zip(widened.split(_CONVERTED), piece.split(_CONVERTED), strict=True):
        into.copy_(part)
