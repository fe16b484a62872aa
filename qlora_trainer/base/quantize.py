"""Weights to NF4 codes: bit for bit what bitsandbytes computes, in cache-sized pieces on a CPU.

NF4 (QLoRA, https://arxiv.org/abs/2305.14314, section 3) scales every block of `block_size` weights
by its largest magnitude and keeps the number of the nearest of 16 fixed values. On a CPU
`quantize_pieces.py` does it; on any other device, and for the double quantization of the block
scales, bitsandbytes' own kernels do the work.
"""

import math
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qlora_trainer.base import bitsandbytes_cpu
from qlora_trainer.base.quantize_pieces import quantize_pieces

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALE_BLOCK_SIZE = 256  # block scales per second-level scale, fixed by bitsandbytes' format
QUANTIZABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class NF4Tensors:
    """One quantized weight: packed codes and the scales of its blocks.

    Attributes:
        codes: uint8 (ceil(weights / 2),), two codes a byte, the earlier weight in the high half.
        absmax: fp32 (blocks,), or uint8 (blocks,) when double-quantized; then also:
        absmax_scale: fp32 (ceil(blocks / 256),).
        absmax_code: fp32 (256,), the value of each 8-bit code.
        absmax_offset: fp32 (), the mean that was taken off before.
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None = None
    absmax_code: Tensor | None = None
    absmax_offset: Tensor | None = None


def quantize_nf4(weight: Tensor, *, block_size: int = 64, double_quant: bool = True) -> NF4Tensors:
    """Quantize a weight on the device it is on, without changing it.

    Args:
        weight: fp32, fp16 or bf16, any shape; blocks run over its row-major order.
        block_size: Weights per scale.
        double_quant: Also keep the scales in 8 bits.

    Raises:
        ValueError: Another dtype or block size, or a weight that is not finite.
    """
    if weight.dtype not in QUANTIZABLE_DTYPES:
        raise ValueError(f"cannot quantize {weight.dtype}; cast to float32 first")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size = {block_size}: must be one of {BLOCK_SIZES}")
    with torch.no_grad():
        codes, absmax = _quantize_blocks(weight, block_size)
        if absmax.device.type != "meta" and not _is_finite(weight, absmax):
            raise ValueError("holds values that are not finite (NaN or infinity)")
        if not double_quant:
            return NF4Tensors(codes, absmax)
        offset = absmax.mean()
        absmax_codes, state = bnb.quantize_blockwise(
            absmax - offset, code=_dynamic_map(absmax.device), blocksize=SCALE_BLOCK_SIZE
        )
        return NF4Tensors(absmax=absmax_codes, codes=codes, absmax_scale=state.absmax,
                          absmax_code=state.code, absmax_offset=offset)  # fmt: skip


def empty_nf4(
    elements: int, *, block_size: int, double_quant: bool, device: torch.device
) -> NF4Tensors:
    """The tensors `quantize_nf4` would return for so many weights, with nothing in them."""
    blocks = -(-elements // block_size)
    codes = torch.empty(-(-elements // 2), dtype=torch.uint8, device=device)
    if not double_quant:
        return NF4Tensors(codes, torch.empty(blocks, dtype=torch.float32, device=device))
    return NF4Tensors(
        codes,
        absmax=torch.empty(blocks, dtype=torch.uint8, device=device),
        absmax_scale=torch.empty(-(-blocks // SCALE_BLOCK_SIZE), device=device),
        absmax_code=torch.empty(256, device=device),
        absmax_offset=torch.empty((), device=device),
    )


def dequantize_absmax(tensors: NF4Tensors) -> Tensor:
    """The fp32 scale of every block. -> (blocks,)."""
    if tensors.absmax_scale is None:
        return tensors.absmax
    offset = tensors.absmax_offset
    assert tensors.absmax_code is not None
    assert offset is not None
    parts = (tensors.absmax, tensors.absmax_scale, tensors.absmax_code, SCALE_BLOCK_SIZE)
    called = bitsandbytes_cpu.dequantize_blockwise(*parts)
    if called is not None:
        return called.add_(offset)
    absmax: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(*parts, torch.float32)
    return absmax.add_(offset)


def dequantize_nf4(
    tensors: NF4Tensors, shape: tuple[int, ...], block_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight its codes stand for, by bitsandbytes' kernel. -> `shape` in `dtype`."""
    if dtype not in QUANTIZABLE_DTYPES:  # the kernel hands out memory it has not written
        return dequantize_nf4(tensors, shape, block_size, torch.float32).to(dtype)
    absmax = dequantize_absmax(tensors)
    elements = math.prod(shape)
    # Blocks run over the flat order, and so we ask for the flat order. bitsandbytes' CPU kernel
    # (0.50.2, avx512) takes rows for whole numbers of blocks: a row of 96 with blocks of 64 comes
    # back with wrong scales. One block a row keeps it right and lets it use all threads.
    if elements % block_size == 0:
        read_shape = (elements // block_size, block_size)
        called = bitsandbytes_cpu.dequantize_nf4_blocks(
            tensors.codes, absmax, block_size, read_shape[0], dtype
        )
        if called is not None:
            return called.view(shape)
    else:
        read_shape = (1, elements + elements % 2)  # an odd one ends in a spare half byte
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        tensors.codes, absmax, block_size, "nf4", read_shape, dtype
    )
    return dense.view(-1)[:elements].view(shape)


def quant_state(
    tensors: NF4Tensors, shape: tuple[int, int], block_size: int, dtype: torch.dtype
) -> bnb.QuantState:
    """The scales as bitsandbytes holds them beside a weight's codes, its own tensors in it.

    Args:
        tensors: Of one weight.
        shape: (out_features, in_features) of the weight.
        block_size: Weights per scale.
        dtype: What bitsandbytes is to rebuild the weight in.
    """
    nested = None
    if tensors.absmax_scale is not None:
        nested = bnb.QuantState(
            absmax=tensors.absmax_scale, code=tensors.absmax_code, blocksize=SCALE_BLOCK_SIZE,
            dtype=torch.float32,
        )  # fmt: skip
    return bnb.QuantState(
        absmax=tensors.absmax, shape=torch.Size(shape), code=bnb.get_4bit_type("nf4", "cpu"),
        blocksize=block_size, quant_type="nf4", dtype=dtype, offset=tensors.absmax_offset,
        state2=nested,
    )  # fmt: skip


def _is_finite(weight: Tensor, absmax: Tensor) -> bool:
    """Whether a weight is; seen from its scales on a CPU. A card's kernel passes over NaN there."""
    on_cpu = weight.device.type == "cpu"
    extremes = (absmax.amax(),) if on_cpu else torch.aminmax(weight.detach())
    return bool(torch.stack(list(extremes)).isfinite().all())


def _quantize_blocks(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and fp32 scales: our pieces on a CPU, bitsandbytes' kernel elsewhere."""
    flat = weight.detach().reshape(-1)
    whole = flat.numel() - flat.numel() % block_size
    if weight.device.type != "cpu" or whole == 0:
        return _bitsandbytes_blocks(flat, block_size)
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32)
    quantize_pieces(
        flat[:whole], block_size, codes[: whole // 2], absmax[: whole // block_size], _midpoints()
    )
    if whole < flat.numel():  # the last, shorter block: bitsandbytes rounds it in its own way
        codes[whole // 2 :], absmax[whole // block_size :] = _bitsandbytes_blocks(
            flat[whole:], block_size
        )
    return codes, absmax


def _bitsandbytes_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
        flat, block_size, "nf4", torch.uint8
    )
    return codes.view(-1), absmax


def _midpoints() -> Tensor:
    values = bnb.get_4bit_type("nf4", "cpu")
    midpoints: Tensor = (values[:-1] + values[1:]) / 2
    return midpoints


def _dynamic_map(device: torch.device) -> Tensor:
    """The 8-bit code book of block scales (https://arxiv.org/abs/2110.02861, section 2.1)."""
    code_book: Tensor = bnb.create_dynamic_map()
    return code_book.to(device)
