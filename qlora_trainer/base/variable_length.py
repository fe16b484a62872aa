"""Packed examples in one call of a kernel that is told where each one ends.

torch's `torch.nn.attention.varlen.varlen_attn` is FlashAttention-2's variable-length kernel (Dao
2023, arXiv 2307.08691): the whole row at once, no example sees another, nothing of the scores is
kept. It saves a card the many small launches of example by example. Where it cannot be had
`why_example_by_example` says so, and `base/packed_attention.py` goes on as it does on a CPU.

What the kernel asks for is read from mha_varlen_fwd and mha_varlen_bwd, aten/src/ATen/native/
transformers/cuda/flash_attn/flash_api.cpp. Its window counts the tokens back that are seen, the
model's (as transformers') counts the token itself as well: one more. It has no implementation on a
CPU: what is tested here is the choice, every argument (against a plain twin of the same signature),
and the step traced without weights; the kernel itself only where there is a card.

    H query heads, G key heads, T tokens of the row, D head size, N examples
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

FIRST_CAPABILITY = (8, 0)
WIDEST_HEAD = 256


def why_example_by_example(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_size: int,
    value_size: int | None = None,
    *,
    causal: bool = True,
    dropout: float = 0.0,
) -> str | None:
    """Why packed examples cannot attend in one call; None where they can.

    Args:
        capability: Of the card; None where there is none.
        dtype: Of query, key and value.
        head_size: Of queries and keys.
        value_size: Of values; as wide as the keys unless given.
        causal: No token sees what follows it.
        dropout: Of the attention's weights.

    >>> why_example_by_example((7, 5), torch.float16, 64)
    'the kernel begins at compute capability 8.0, and this card has 7.5'
    """
    if capability is None:
        return "the kernel is one of CUDA's"
    if capability < FIRST_CAPABILITY:
        first, here = (".".join(map(str, c)) for c in (FIRST_CAPABILITY, capability))
        return f"the kernel begins at compute capability {first}, and this card has {here}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel works in 16 bit, and the model computes in {str(dtype)[6:]}"
    if head_size > WIDEST_HEAD or head_size % 8:
        return (
            f"the kernel knows heads of up to {WIDEST_HEAD} numbers, by eights, and the model's "
            f"have {head_size}"
        )
    if value_size not in (None, head_size):
        return f"the model's values have {value_size} numbers a head and its keys {head_size}"
    if not causal:
        return "its attention looks ahead"
    if dropout:
        return "the kernel drops no weights, and the model's attention does"
    return None


def attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    kernel: Callable[..., Any] = varlen_attn,
) -> Tensor:
    """Causal attention of each example of a packed row to itself.

    Args:
        query: (1, H, T, D).
        key: (1, G, T, D); G divides H.
        value: (1, G, T, D).
        lengths: (N,) int32 on the host; their sum is T.
        window: Tokens seen, the own one included; None sees all.
        scale: Of the scores; None is 1 / sqrt(D).
        kernel: Takes what `varlen_attn` takes.

    Returns:
        (1, T, H, D).
    """
    ends = torch.zeros(lengths.numel() + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=ends[1:])
    longest = int(lengths.max())
    # From pageable memory torch copies a few bytes at once: nothing waits for the card.
    starts = ends.to(query.device, non_blocking=True)
    back = -1 if window is None or longest <= window else window - 1
    attended: Tensor = kernel(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),  # (T, heads, D)
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=(back, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return attended[None]
