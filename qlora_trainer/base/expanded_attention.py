"""Grouped-query attention for cards whose fused kernels know no groups: keys expanded first.

torch's memory-efficient attention takes as many key heads as query heads; only flash attention
takes fewer, and it begins at compute capability 8.0 (sdp::check_grouped_query_attention and
check_sm_version, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp) and not in fp32.
transformers' `sdpa` asks for groups wherever there is no mask, so a Turing card, and any in fp32,
falls back to the kernel that builds every score. Here keys and values are repeated to all heads
before: a few megabytes instead of T x T.

The function stands in transformers' public registries; it is set on the model instance.

    B rows, H query heads, G key heads, T tokens, D head size
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from qlora_trainer.base.own_attention import replace_sdpa

NAME = "sdpa_expanded"
FIRST_WITH_GROUPS = (8, 0)


def expands_keys(compute_capability: tuple[int, int], compute_dtype: torch.dtype) -> bool:
    """Whether no fused kernel of a card takes fewer key heads than query heads.

    >>> expands_keys((7, 5), torch.float16), expands_keys((8, 6), torch.bfloat16)
    (True, False)
    """
    return compute_capability < FIRST_WITH_GROUPS or compute_dtype == torch.float32


def use_expanded_attention(
    model: Any, compute_capability: tuple[int, int], compute_dtype: torch.dtype
) -> bool:
    """Expand keys and values first where a card's fused kernel needs it.

    Args:
        model: Of transformers; only one whose attention is `sdpa` is changed.
        compute_capability: Of the card.
        compute_dtype: Of queries and keys.

    Returns:
        Whether it does now.
    """
    return expands_keys(compute_capability, compute_dtype) and replace_sdpa(
        model, NAME, attend_expanded, as_sdpa=True
    )


def attend_expanded(
    module: Any,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, G, T, D)
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The usual `sdpa`, shown as many key heads as query heads. -> (B, T, H, D)."""
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)  # (B, H, T, D)
    seen = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        seen, query, key, value, attention_mask, **kwargs
    )
    return attended
