"""Scratch memory of the fused attention kernels' backward, by card, dtype and shape.

Arithmetic read from aten/src/ATen/native/transformers/cuda; `cuda_rules` says when it is taken.

Legend: B batch, T query positions, S key positions, H heads, D head size.
"""

import math
from dataclasses import dataclass

import torch

from qlora_trainer.memory.gpus import Gpu


@dataclass(frozen=True)
class EfficientBackwardKernel:
    """The cutlass kernel `dispatch_cutlassB` picks, as far as its workspace depends on it."""

    block_i: int
    block_j: int
    max_k: int
    output_in_registers: bool
    computes_delta: bool


def efficient_backward_kernel(
    gpu: Gpu, dtype: torch.dtype, head_size: int
) -> EfficientBackwardKernel:
    """Choose as mem_eff_attention/kernels/generate_kernels.py orders the candidates.

    Smallest sufficient `max_k` first, then the larger block if it fits shared memory (128 wide
    ones need more than the 64 to 100 KiB of sm_75, sm_86, sm_89 and sm_12x).
    """
    half = dtype in (torch.float16, torch.bfloat16)
    max_k = next(k for k in (32, 64, 128, 2**16) if head_size <= k)
    roomy = gpu.capability in (80, 87, 90, 100, 103)
    if half and gpu.capability in (86, 89) and 64 < head_size <= 96:
        return EfficientBackwardKernel(128, 64, 96, True, True)
    block_i = 128 if max_k > 64 and roomy and (half or gpu.capability >= 80) else 64
    in_registers = half and max_k <= block_i
    block_j = 128 if in_registers and gpu.capability >= 80 and max_k > 64 else 64
    return EfficientBackwardKernel(block_i, block_j, max_k, in_registers, half)


def efficient_backward_workspace_bytes(
    kernel: EfficientBackwardKernel, dtype: torch.dtype, shape: tuple[int, int, int, int, int]
) -> int:
    """`Params::workspace_size` of kernel_backward.h, with the key-splitting heuristic around it.

    Args:
        kernel: The kernel chosen.
        dtype: Of query, key and value.
        shape: (B, H, T, S, D).
    """
    batch, heads, queries, keys, head_size = shape
    accumulates_kv = dtype != torch.float32 and not kernel.output_in_registers
    splits = math.ceil(keys / kernel.block_j)
    if accumulates_kv:
        splits = min(splits, 200 // (batch * heads))
    splits = max(splits, 1)
    key_side = 0
    if accumulates_kv:
        aligned = math.ceil(head_size / kernel.block_i) * kernel.block_i
        key_side = splits * kernel.block_j * aligned
    tile = 4 + kernel.block_i * kernel.block_j  # lock, counter, padding, then the fp32 tile
    query_side = math.ceil(queries / kernel.block_i) * math.ceil(head_size / kernel.block_j) * tile
    per_head = math.ceil((2 * key_side + query_side) / 4) * 4
    return batch * heads * per_head * 4


def flash_backward_workspaces(query: torch.Tensor, key: torch.Tensor) -> dict[str, int]:
    """Name -> bytes of what flash attention's backward takes beside the gradients.

    Args:
        query: (B, H, T, D).
        key: (B, H of keys, S, D).
    """
    batch, heads, queries, head_size = query.shape
    rounded = math.ceil(queries / 128) * 128
    wide = math.ceil(head_size / 32) * 32 if head_size <= 192 else 256
    sizes = {
        "softmax_d": 4 * batch * heads * rounded,
        "dq_accum": 4 * batch * heads * rounded * wide,
    }
    if key.shape[1] != heads:
        expanded = batch * heads * key.shape[2] * head_size * key.element_size()
        sizes |= {"dk_expanded": expanded, "dv_expanded": expanded}
    return sizes


def varlen_backward_workspaces(
    query: torch.Tensor, key: torch.Tensor, examples: int
) -> dict[str, int]:
    """Name -> bytes of what the variable-length kernel's backward takes beside the gradients.

    Args:
        query: (T, H, D).
        key: (S, heads of keys, D).
        examples: In the row.
    """
    tokens, heads, head_size = query.shape
    rows = tokens + 128 * examples
    step = 32 if head_size <= 128 else 64
    wide = math.ceil(head_size / step) * step
    sizes = {"softmax_d": 4 * heads * rows, "dq_accum": 4 * rows * heads * wide}
    if key.shape[1] != heads:
        expanded = key.shape[0] * heads * head_size * key.element_size()
        sizes |= {"dk_expanded": expanded, "dv_expanded": expanded}
    return sizes
