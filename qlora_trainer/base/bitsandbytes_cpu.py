"""bitsandbytes' CPU kernels called in its C library itself, without its operators around them.

A step on a CPU rebuilds every weight two or three times. Through bitsandbytes' registered operator
that costs more than the C function itself does for a weight of SmolLM2: torch's dispatcher, the
Python behind the operator and both once more for the block scales, all of it cold between large
products. The C functions take addresses and are the same; their names are bitsandbytes' own affair,
so a kernel is taken only where it is there and gives the operator's bits on a small example.
Everything else (other devices and dtypes, tensors without values, tracing, shapes that bitsandbytes
hands to another implementation, sizes that do not belong together, which the C functions would read
beyond) goes through the operators.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SUFFIXES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_FALLBACK_BLOCK_SIZE = 2048  # from here on the operator takes another way
_Kernel = Callable[..., None]


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code_book: Tensor, block_size: int
) -> Tensor | None:
    """8-bit codes to fp32. -> shape of `codes`, or None where the operator is to be called.

    Args:
        codes: uint8, contiguous.
        absmax: fp32 (blocks,).
        code_book: fp32 (256,).
        block_size: Codes per scale.
    """
    kernel = _checked("8bit", torch.float32) if _direct(codes, absmax, code_book) else None
    if kernel is None or absmax.numel() * block_size < codes.numel() or code_book.numel() < 256:
        return None
    out = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    kernel(
        code_book.data_ptr(), codes.data_ptr(), absmax.data_ptr(), out.data_ptr(),
        block_size, codes.numel(),
    )  # fmt: skip
    return out


def dequantize_nf4_blocks(
    codes: Tensor, absmax: Tensor, block_size: int, blocks: int, dtype: torch.dtype
) -> Tensor | None:
    """4-bit codes to weights. -> (blocks, block_size), or None where the operator is to be called.

    Args:
        codes: uint8 (blocks * block_size / 2,), contiguous.
        absmax: fp32 (blocks,).
        block_size: Weights per scale.
        blocks: Whole ones.
        dtype: Of the result.
    """
    if block_size >= _FALLBACK_BLOCK_SIZE or block_size % 2 or not _direct(codes, absmax):
        return None
    kernel = _checked("nf4", dtype)
    if kernel is None or 2 * codes.numel() != blocks * block_size or absmax.numel() < blocks:
        return None
    out = torch.empty((blocks, block_size), dtype=dtype, device="cpu")
    kernel(
        codes.data_ptr(), absmax.data_ptr(), out.data_ptr(), block_size, blocks, block_size
    )  # fmt: skip
    return out


def _direct(codes: Tensor, *scales: Tensor) -> bool:
    """Whether addresses may be handed on: plain tensors with values, and nobody is tracing."""
    if torch.compiler.is_compiling() or codes.dtype != torch.uint8:
        return False
    return _plain(codes) and all(_plain(t) and t.dtype == torch.float32 for t in scales)


def _plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()


@functools.cache
def _checked(kind: str, dtype: torch.dtype) -> _Kernel | None:
    """The C function, or None where it is missing or does not give the operator's bits."""
    if dtype not in _SUFFIXES:
        return None
    name = "cdequantize_blockwise_cpu_" + ("nf4_" if kind == "nf4" else "") + _SUFFIXES[dtype]
    from bitsandbytes.cextension import lib

    function = getattr(getattr(lib, "_lib", None), name, None)
    if function is None:
        return None
    # A prototype of our own: the function object of bitsandbytes' library is left as it is.
    addresses, counts = (3, 3) if kind == "nf4" else (4, 2)
    takes: list[Any] = [ctypes.c_void_p] * addresses + [ctypes.c_longlong] * counts
    kernel: _Kernel = ctypes.cast(function, ctypes.CFUNCTYPE(None, *takes))
    example = _nf4_example if kind == "nf4" else _blockwise_example
    with torch.device("cpu"):  # whatever device new tensors are on by default
        return kernel if example(kernel, dtype) else None


def _nf4_example(kernel: _Kernel, dtype: torch.dtype) -> bool:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)
    absmax = torch.linspace(0.1, 3.0, 16)
    expected = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, absmax, 64, "nf4", (16, 64), dtype
    )
    out = torch.zeros(16, 64, dtype=dtype)
    kernel(codes.data_ptr(), absmax.data_ptr(), out.data_ptr(), 64, 16, 64)
    return torch.equal(out, expected)


def _blockwise_example(kernel: _Kernel, dtype: torch.dtype) -> bool:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3)[:700]
    absmax, book = torch.tensor([0.5, 2.0, 3.0]), torch.linspace(-1.0, 1.0, 256)
    expected = torch.ops.bitsandbytes.dequantize_blockwise.default(codes, absmax, book, 256, dtype)
    out = torch.zeros(700, dtype=dtype)
    kernel(book.data_ptr(), codes.data_ptr(), absmax.data_ptr(), out.data_ptr(), 256, 700)
    return torch.equal(out, expected)
