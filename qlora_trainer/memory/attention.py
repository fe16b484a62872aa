"""The attention kernel a card would run, chosen on weightless tensors.

`scaled_dot_product_attention` asks the tensors' device which kernel it has; `meta` answers with the
one that builds every score, and a 7B model seems to need twice its memory. So the simulated model
gets an attention function of its own, through transformers' public registries, that decides as
torch does on CUDA and calls that kernel's operator. The choice holds inside recomputation too.

Source of the decision: sdp::select_sdp_backend and the `check_*` functions of
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (order: flash, memory-efficient, math; cuDNN
comes first on data-centre Hopper and Blackwell only, and is not modelled).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import (
    create_position_bias_mask,
    repeat_kv,
    use_gqa_in_sdpa,
)
from transformers.masking_utils import sdpa_mask

from qlora_trainer.base.expanded_attention import expands_keys
from qlora_trainer.base.tiled_attention import NAME as TILED
from qlora_trainer.base.tiled_attention import takes_tiles, tiles_of
from qlora_trainer.memory.gpus import Gpu
from qlora_trainer.memory.tracker import AllocationTracker
from qlora_trainer.tasks.task import Batch

# transformers' masks ask the tensors two questions; asking function -> answer
ANSWERS = {
    "find_packed_sequence_indices": True,  # "is every row one sequence?"; see `answers_for`
    "_ignore_causal_mask_sdpa": False,  # "does the given mask hide nothing?"
    "_ignore_bidirectional_mask_sdpa": False,
}
FORESEEN = "qlora_foresight"  # how the names of our attentions begin
MATH = "math"
FLASH = "flash"
CPU_FLASH = "flash on the CPU"
EFFICIENT = "memory-efficient"


def answers_for(batch: Batch) -> dict[str, bool]:
    """What transformers' masks are told of a prepared batch, which keeps positions that restart."""
    return {"find_packed_sequence_indices": "position_ids" not in batch}


def choose_kernel(
    gpu: Gpu, dtype: torch.dtype, head_size: int, *, masked: bool, grouped: bool,
    unequal: bool = False,
) -> str:  # fmt: skip
    """The kernel `scaled_dot_product_attention` takes on a card.

    Args:
        gpu: The card.
        dtype: Of query, key and value.
        head_size: The larger one of keys and values.
        masked: A mask tensor is given (a causal flag is none).
        grouped: Fewer key heads than query heads, not expanded beforehand.
        unequal: Values are of another size than keys, as in DeepSeek's attention.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if half and gpu.capability >= 80 and head_size <= 256 and not (masked or unequal):
        return FLASH
    known = half if gpu.capability >= 80 else dtype == torch.float16
    aligned = head_size % (8 if half else 4) == 0
    if (known or dtype == torch.float32) and not grouped and aligned:
        return EFFICIENT
    return MATH


def _run(kernel: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
         dropout: float, causal: bool, scale: float | None) -> Tensor:  # fmt: skip
    if kernel == FLASH:
        size = query.shape[-1]
        padding = -size % 8
        if padding:
            query, key, value = (F.pad(t, (0, padding)) for t in (query, key, value))
            scale = scale if scale is not None else size**-0.5
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        out: Tensor = attend(query, key, value, dropout, causal, scale=scale)[0]
        return out[..., :size] if padding else out
    if kernel == CPU_FLASH:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        bias = None if mask is None else _additive(mask, query.dtype)  # kept for the backward
        on_cpu: Tensor = attend(query, key, value, dropout, causal, attn_mask=bias, scale=scale)[0]
        return on_cpu
    if kernel == EFFICIENT:
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        bias = None if mask is None else additive_bias(mask, query)
        attended: Tensor = attend(query, key, value, bias, recorded, dropout, causal, scale=scale)[
            0
        ]
        return attended
    watching = _get_current_dispatch_mode()
    if isinstance(watching, AllocationTracker):
        watching.count_kernel("math attention (builds every score)")
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=causal,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip


def additive_bias(mask: Tensor, query: Tensor) -> Tensor:
    """What the memory-efficient kernel makes of a mask: additive, its rows padded to 16.

    Source: convert_boolean_attn_mask and pad_bias, aten/src/ATen/native/transformers/attention.cpp.
    """
    mask = _additive(mask, query.dtype)
    size = mask.shape[-1]
    if size % 16:
        mask = F.pad(mask, (0, -size % 16))[..., :size]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], size)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of truth values as one of numbers, as `convert_boolean_attn_mask` makes it."""
    if mask.dtype != torch.bool:
        return mask
    hidden = torch.full((), float("-inf"), dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros_like(hidden), hidden)


def attention_for(gpu: Gpu | None, *, in_tiles: bool = False) -> str:
    """Register an attention that decides as this card (None: a CPU) does.

    Args:
        gpu: The card.
        in_tiles: Whether the CPU attends in tiles (`base/tiled_attention.py`) where it can.

    Returns:
        Its name.
    """
    name = f"{FORESEEN}_sm{gpu.capability}" if gpu is not None else f"{FORESEEN}_cpu"
    name += f"_{TILED}" if in_tiles else ""

    def attend(
        module: Any,
        query: Tensor,  # (B, H, T, D)
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        choices: dict[str, Any] = {"dropout": dropout, "is_causal": is_causal, **kwargs}
        choices["position_bias"] = position_bias
        if in_tiles and takes_tiles(module, query, key, value, attention_mask, **choices):
            return tiles_of(module, query, key, value, scaling), None
        grouped = getattr(module, "num_key_value_groups", 1) > 1
        # `base/expanded_attention.py` repeats the keys where no fused kernel knows groups
        early = gpu is not None and expands_keys(gpu.compute_capability, query.dtype)
        if grouped and (early or not use_gqa_in_sdpa(attention_mask, key, value)):
            key = repeat_kv(key, module.num_key_value_groups)
            value = repeat_kv(value, module.num_key_value_groups)
            grouped = False
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and query.shape[2] > 1 and attention_mask is None
        if position_bias is not None:  # T5's: one more additive mask, as large as the scores
            attention_mask = create_position_bias_mask(
                position_bias, attention_mask, causal, query, key
            )
            causal = False
        width = max(query.shape[-1], value.shape[-1])
        # sdp_utils_cpp.cpp: the CPU's one fused kernel takes any mask and grouping, no dropout
        kernel = MATH if dropout else CPU_FLASH
        if gpu is not None:
            kernel = choose_kernel(
                gpu, query.dtype, width, masked=attention_mask is not None, grouped=grouped,
                unequal=query.shape[-1] != value.shape[-1],
            )  # fmt: skip
        out = _run(kernel, query, key, value, attention_mask, dropout, causal, scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name
