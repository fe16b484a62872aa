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

Saved: Q, K, V. Of the scores only a tile's n rows are ever alive (`TILE_ELEMENTS`), as in Rabe and
Staats 2021 (arXiv:2112.05682); keys' gradients are summed over tiles in fp32. Scores stay in fp32
between product and softmax, as in the kernel it replaces, whose error a test holds it to. Query
heads that share a key head are rows of one product, so keys are never repeated. Given up: masks,
dropout and windows (the model's `sdpa` takes those), and gradients of gradients.

    B rows, H query heads, G key heads, R = H / G, T tokens, D head size
"""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_trainer.base.own_attention import replace_sdpa

NAME = "tiled"
TILE_TOKENS = 64
TILE_ELEMENTS = 2**22  # scores of one tile over all heads: 16 MiB in fp32
_FEWEST_TOKENS = 8
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
        return tiled_attention(query, key, value, kwargs.get("scaling")), None
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


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """Causal attention, recording its gradients.

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D), and so is `value`.
        value: H is a multiple of G.
        scale: Of the scores; None is 1 / sqrt(D).

    Returns:
        (B, T, H, D), in the dtype of `query`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attended: Tensor = _TiledAttention.apply(query, key, value, scale)
    return attended


class _Sizes(NamedTuple):
    """Of one call."""

    rows: int
    groups: int
    shared: int
    tokens: int
    head: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> "_Sizes":
        rows, heads, tokens, head = query.shape
        groups = key.shape[1]
        return cls(rows, groups, heads // groups, tokens, head)

    @property
    def tile_tokens(self) -> int:
        wide = TILE_ELEMENTS // max(1, self.rows * self.groups * self.shared * self.tokens)
        return min(self.tokens, TILE_TOKENS, max(_FEWEST_TOKENS, wide))

    def tiles(self) -> Iterator[tuple[int, int]]:
        """First and last token of each."""
        size = self.tile_tokens
        return ((first, min(first + size, self.tokens)) for first in range(0, self.tokens, size))


class _Scores:
    """Where a tile's scores are made; the same memory for every tile."""

    def __init__(self, query: Tensor, key: Tensor, sizes: _Sizes, scale: float) -> None:
        self.query = query.unflatten(1, (sizes.groups, sizes.shared))  # (B, G, R, T, D)
        self.sizes = sizes
        wide = torch.promote_types(query.dtype, torch.float32)
        batch = sizes.rows * sizes.groups
        scaled = key.reshape(batch, sizes.tokens, sizes.head).to(wide, copy=True).mul_(scale)
        self.key = scaled.mT  # (BG, D, T)
        size, lines = sizes.tile_tokens, batch * sizes.shared
        self._above = query.new_full((size, size), float("-inf"), dtype=wide).triu_(1)
        self._queries = query.new_empty(lines * size * sizes.head, dtype=wide)
        self._scores = query.new_empty(lines * size * sizes.tokens, dtype=wide)
        self._probabilities = query.new_empty(lines * size * sizes.tokens)

    def of(self, first: int, last: int) -> Tensor:
        """Probabilities (BG, R n, t) of a tile, in the queries' dtype."""
        rows, groups, shared, _, head = self.sizes
        batch, size = rows * groups, last - first
        lines = shared * size
        queries = self._queries[: batch * lines * head]
        queries.view(rows, groups, shared, size, head).copy_(self.query[:, :, :, first:last])
        scores = self._scores[: batch * lines * last].view(batch, lines, last)
        torch.bmm(queries.view(batch, lines, head), self.key[:, :, :last], out=scores)
        scores.view(batch, shared, size, last)[..., first:].add_(self._above[:size, :size])
        torch.softmax(scores, -1, out=scores)
        if scores.dtype == self.query.dtype:  # fp64, for gradcheck
            return scores
        return self._probabilities[: scores.numel()].view_as(scores).copy_(scores)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        sizes = _Sizes.of(query, key)
        rows, groups, shared, tokens, head = sizes
        values = value.reshape(rows * groups, tokens, head)
        scores = _Scores(query, key, sizes, scale)
        out = query.new_empty(rows, tokens, groups * shared, head)
        by_group = _by_group(out, sizes)
        for first, last in sizes.tiles():
            probabilities = scores.of(first, last)
            tile = torch.bmm(probabilities, values[:, :last])  # (BG, R n, D)
            by_group[:, :, :, first:last] = tile.view(rows, groups, shared, last - first, head)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        sizes = _Sizes.of(query, key)
        rows, groups, shared, tokens, head = sizes
        batch = rows * groups
        keys, values = (tensor.reshape(batch, tokens, head) for tensor in (key, value))
        scores = _Scores(query, key, sizes, ctx.scale)
        grads = _by_group(grad_out, sizes)
        grad_query = query.new_empty(rows, tokens, groups * shared, head)
        of_query = _by_group(grad_query, sizes)
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_key, grad_value = (keys.new_zeros(keys.shape, dtype=wide) for _ in range(2))
        space = query.new_empty(batch * shared * sizes.tile_tokens * tokens)
        for first, last in sizes.tiles():
            probabilities = scores.of(first, last)
            queries, g = (
                tensor[:, :, :, first:last].reshape(batch, -1, head)  # (BG, R n, D)
                for tensor in (scores.query, grads)
            )
            grad_value[:, :last] += torch.bmm(probabilities.mT, g)
            slopes = space[: probabilities.numel()].view_as(probabilities)
            torch.bmm(g, values[:, :last].mT, out=slopes)  # dP, and then dS in its place
            torch.ops.aten._softmax_backward_data.out(
                slopes, probabilities, -1, probabilities.dtype, grad_input=slopes
            )
            tile = torch.bmm(slopes, keys[:, :last]).mul_(ctx.scale)
            of_query[:, :, :, first:last] = tile.view(rows, groups, shared, last - first, head)
            grad_key[:, :last] += torch.bmm(slopes.mT, queries)
        grad_key.mul_(ctx.scale)
        shaped = (tensor.to(query.dtype).view(key.shape) for tensor in (grad_key, grad_value))
        return grad_query.transpose(1, 2), *shaped, None


def _by_group(tensor: Tensor, sizes: _Sizes) -> Tensor:
    """(B, T, H, D) seen as (B, G, R, T, D)."""
    return tensor.unflatten(2, (sizes.groups, sizes.shared)).permute(0, 2, 3, 1, 4)
