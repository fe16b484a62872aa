r"""Causal attention on a CPU in tiles of queries, by matrix products.

torch's own kernel for a CPU (`_scaled_dot_product_flash_attention_for_cpu`), without AMX,
multiplies 16-bit numbers without the processor's 16-bit instructions, and in fp32 is slow over some
lengths (`scripts/benchmark_attention.py` says what that comes to). Batched products are faster. So
queries go in tiles of n tokens, each tile against the keys up to its own end, with s the scale:

    S = s Q K^T                   (n, t)    fp32, -inf above the tile's diagonal
    P = softmax(S)                (n, t)    fp32, then the dtype of Q
    O = P V                       (n, D)

Backward, with g = dL/dO; P is computed again:

    dV += P^T g                   dP = g V^T
    dS = P * (dP - rowsum(dP * P))
    dQ = s dS K                   dK += s dS^T Q

Saved: Q, K, V. Of the scores only a tile's n rows are ever alive (`attention_tiles.py`), as in
Rabe and Staats 2021 (arXiv:2112.05682); keys' gradients are summed over tiles in fp32. Scores stay
in fp32 between product and softmax, as in the kernel it replaces, whose error a test holds it to.
Given up: masks, dropout and windows (the model's `sdpa` takes those), and gradients of gradients.

All P may be kept instead, H T / 2 numbers a token: two fifths of the backward are then left out. A
layer that is computed again anyway keeps them for that moment, where they are few (`KEPT_BYTES`);
one that keeps its activations does where it is told to (`keep_probabilities`).

    B rows, H query heads, G key heads, R = H / G, T tokens, D head size
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_trainer.base.attention_tiles import Probabilities, Sizes, tile_of
from qlora_trainer.base.own_attention import replace_sdpa

NAME = "tiled"
KEPT_BYTES = 2**25  # probabilities of one layer that is computed again
_KEEPING = "_keeping_of_tiled_attention"
# Tokens for which tiles win, by what is computed in. Below 768 torch's kernel takes 64 queries at a
# time in fp32, too, and by its own loops; from 1,024 on it is level.
_TOKENS = {torch.bfloat16: range(2, sys.maxsize), torch.float32: range(256, 1024)}
# what a layer may hand on besides: added to scores, bending them, or keys that come from elsewhere
_BEYOND = ("position_bias", "softcap", "cache", "s_aux")


def chooses_tiles(attention: str | None, compute_dtype: torch.dtype) -> bool:
    """Whether a base on a CPU may attend in tiles: nobody chose otherwise, in bf16 or fp32.

    Args:
        attention: transformers' name of what the user chose; None for our choice.
        compute_dtype: Of the base.
    """
    return attention is None and compute_dtype in _TOKENS


def use_tiled_attention(model: Any) -> bool:
    """Let a model on a CPU attend in tiles wherever it asks for plain causal attention.

    Args:
        model: Of transformers; only one whose attention is `sdpa` is changed.

    Returns:
        Whether it does now.
    """
    return replace_sdpa(model, NAME, attend_in_tiles)


def attends_in_tiles(model: Any) -> bool:
    """Whether it may: its attention is ours, of packed examples or as foreseen."""
    return str(getattr(model.config, "_attn_implementation", "")).endswith(NAME)


def leave_tiled_attention(model: Any) -> None:
    """Let a model attend by torch's own kernel again, as whoever loads it elsewhere will."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def attend_in_tiles(
    module: Any,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, G, T, D)
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in tiles where that is what is asked for, otherwise as `sdpa`. -> (B, T, H, D)."""
    if takes_tiles(module, query, key, value, attention_mask, **kwargs):
        return tiles_of(module, query, key, value, kwargs.get("scaling")), None
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return attended


def takes_tiles(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> bool:
    """Whether attention is plain and causal: whole sequences, no mask, no dropout; and faster so.

    Takes what an attention takes; nothing that changes scores (`_BEYOND`) may be among it.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return (
        bool(causal)
        and attention_mask is None
        and not dropout
        and all(kwargs.get(name) is None for name in _BEYOND)
        and query.shape[2] in _TOKENS.get(query.dtype, ())
        and query.shape[2] == key.shape[2]
        and query.shape[1] % key.shape[1] == 0
        and query.shape[-1] == value.shape[-1]
    )


def tiles_of(
    module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """`tiled_attention` of an attention, which keeps its probabilities where it was told to."""
    told = module.__dict__.get(_KEEPING, _Keeping())
    keeps = told.kept
    if told.recomputed:
        held = Sizes.of(query, key).probabilities * query.element_size()
        keeps = held <= KEPT_BYTES
    return tiled_attention(query, key, value, scale, keeps=keeps)


def keep_probabilities(
    layer: nn.Module, *, kept: bool | None = None, recomputed: bool | None = None
) -> None:
    """Say to the attentions of a layer, or of a model, when tiles keep their probabilities.

    Args:
        layer: Its attentions are told, on the instance.
        kept: Whether they do in a layer that keeps its activations; None: as it was.
        recomputed: Whether the layer computes its activations again; None: as it was.
    """
    for part in layer.modules():
        if hasattr(part, "is_causal"):  # what an attention of transformers says of itself
            was = part.__dict__.get(_KEEPING, _Keeping())
            part.__dict__[_KEEPING] = _Keeping(
                was.kept if kept is None else kept,
                was.recomputed if recomputed is None else recomputed,
            )


class _Keeping(NamedTuple):
    """What one attention was told."""

    kept: bool = False
    recomputed: bool = False


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, *, keeps: bool = False
) -> Tensor:
    """Causal attention, recording its gradients.

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D), and so is `value`.
        value: H is a multiple of G.
        scale: Of the scores; None is 1 / sqrt(D).
        keeps: Keep the probabilities for the backward.

    Returns:
        (B, T, H, D), in the dtype of `query`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attended: Tensor = _TiledAttention.apply(query, key, value, scale, keeps)
    return attended


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, keeps: bool
    ) -> Tensor:
        keeps = keeps and any(ctx.needs_input_grad)
        sizes = Sizes.of(query, key)
        values = value.reshape(sizes.batch, sizes.tokens, sizes.head)
        probabilities = Probabilities(query, key, sizes, scale, keeps)
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        by_group = sizes.by_group(out)
        for first, last in sizes.tiles():
            tile = torch.bmm(probabilities.of(first, last), values[:, :last])  # (BG, n R, D)
            part = by_group[:, :, first:last]
            part.copy_(tile.view(part.shape))
        ctx.save_for_backward(query, key, value, probabilities.all if keeps else None)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, kept = ctx.saved_tensors
        sizes = Sizes.of(query, key)
        keys, values = (t.reshape(sizes.batch, sizes.tokens, sizes.head) for t in (key, value))
        probabilities = None
        if kept is None:
            probabilities = Probabilities(query, key, sizes, ctx.scale, keeps=False)
        by_group, grads = sizes.by_group(query.transpose(1, 2)), sizes.by_group(grad_out)
        grad_query = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
        of_query = sizes.by_group(grad_query)
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_key, grad_value = (keys.new_zeros(keys.shape, dtype=wide) for _ in range(2))
        space = query.new_empty(sizes.batch * sizes.shared * sizes.tile_tokens * sizes.tokens)
        begin = 0
        for first, last in sizes.tiles():
            if probabilities is None:
                made = tile_of(kept, begin, sizes, first, last)
                begin += made.numel()
            else:
                made = probabilities.of(first, last)
            queries, g = (
                sizes.as_rows(tensor[:, :, first:last]) for tensor in (by_group, grads)
            )  # (BG, n R, D)
            grad_value[:, :last] += torch.bmm(made.mT, g)
            slopes = tile_of(space, 0, sizes, first, last)
            torch.bmm(g, values[:, :last].mT, out=slopes)  # dP, and then dS in its place
            torch.ops.aten._softmax_backward_data.out(
                slopes, made, -1, made.dtype, grad_input=slopes
            )
            tile = torch.bmm(slopes, keys[:, :last]).mul_(ctx.scale)
            part = of_query[:, :, first:last]
            part.copy_(tile.view(part.shape))
            grad_key[:, :last] += torch.bmm(slopes.mT, queries)
        grad_key.mul_(ctx.scale)
        shaped = (tensor.to(query.dtype).view(key.shape) for tensor in (grad_key, grad_value))
        return grad_query.transpose(1, 2), *shaped, None, None
