"""Tiles of queries in causal attention on a CPU: their sizes, and what is made of one of them.

    B rows, H query heads, G key heads, R = H / G, T tokens, D head size, n tokens of a tile,
    t tokens up to its end

Query heads that share a key head are rows of one product, so keys are never repeated: row t R + r
is token t of head r, and a tile's rows lie together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE_TOKENS = 64
TILE_ELEMENTS = 2**22  # scores of one tile over all heads: 16 MiB in fp32
_FEWEST_TOKENS = 8
# Of all rows together; twice the tokens then cost less to hide than their products save in calls.
# Not in fp32, whose products are slower.
_FEW_HEADS = 16


class Sizes(NamedTuple):
    """Of one call: B, G, R, T, D."""

    rows: int
    groups: int
    shared: int
    tokens: int
    head: int
    narrow: bool  # whether numbers are of 16 bits

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> "Sizes":
        """From queries (B, H, T, D) and keys (B, G, T, D)."""
        rows, heads, tokens, head = query.shape
        groups = key.shape[1]
        narrow = query.element_size() == 2
        return cls(rows, groups, heads // groups, tokens, head, narrow)

    @property
    def batch(self) -> int:
        """Products of one call."""
        return self.rows * self.groups

    @property
    def tile_tokens(self) -> int:
        """Of every tile but the last."""
        heads = self.batch * self.shared
        wide = TILE_ELEMENTS // max(1, heads * self.tokens)
        most = TILE_TOKENS * (2 if self.narrow and heads <= _FEW_HEADS else 1)
        return min(self.tokens, most, max(_FEWEST_TOKENS, wide))

    @property
    def probabilities(self) -> int:
        """Of all tiles."""
        return self.batch * self.shared * sum((last - first) * last for first, last in self.tiles())

    def tiles(self) -> Iterator[tuple[int, int]]:
        """First and last token of each."""
        size = self.tile_tokens
        return ((first, min(first + size, self.tokens)) for first in range(0, self.tokens, size))

    def by_group(self, heads: Tensor) -> Tensor:
        """(B, T, H, D) seen as (B, G, T, R, D)."""
        return heads.unflatten(2, (self.groups, self.shared)).transpose(1, 2)

    def as_rows(self, tile: Tensor) -> Tensor:
        """(B, G, n, R, D) -> (BG, n R, D), one after another."""
        return tile.reshape(self.batch, -1, self.head)


class Probabilities:
    """Makes those of a tile: in the same memory for every tile, or, to keep them, each in its own.

    Attributes:
        all: Of one tile after another where they are kept.
    """

    def __init__(self, query: Tensor, key: Tensor, sizes: Sizes, scale: float, keeps: bool) -> None:
        self.sizes, self.query = sizes, sizes.by_group(query.transpose(1, 2))
        size, lines = sizes.tile_tokens, sizes.batch * sizes.shared
        wide = torch.promote_types(query.dtype, torch.float32)
        self._one_dtype = wide == query.dtype
        scaled = key.reshape(sizes.batch, sizes.tokens, sizes.head).to(wide, copy=True).mul_(scale)
        self._key = scaled.mT  # (BG, D, T)
        self._above = query.new_full((size, size), float("-inf"), dtype=wide).triu_(1)[:, None]
        self._queries = query.new_empty(lines * size * sizes.head, dtype=wide)
        of_tile = lines * size * sizes.tokens
        self.all = query.new_empty(sizes.probabilities if keeps else of_tile)
        self._scores = self.all if self._one_dtype else query.new_empty(of_tile, dtype=wide)
        self._keeps, self._made = keeps, 0

    def of(self, first: int, last: int) -> Tensor:
        """Probabilities (BG, n R, t) of a tile, in the queries' dtype."""
        rows, groups, shared, _, head, _ = self.sizes
        size = last - first
        lines = size * shared
        queries = self._queries[: self.sizes.batch * lines * head]
        queries.view(rows, groups, size, shared, head).copy_(self.query[:, :, first:last])
        made = tile_of(self.all, self._made, self.sizes, first, last)
        scores = made if self._one_dtype else tile_of(self._scores, 0, self.sizes, first, last)
        torch.bmm(self.sizes.as_rows(queries.view(rows, groups, size, shared, head)),
                  self._key[:, :, :last], out=scores)  # fmt: skip
        on_diagonal = scores.view(-1, size, shared, last)[..., first:]
        on_diagonal.add_(self._above[:size, :, :size])
        torch.softmax(scores, -1, out=scores)
        if self._keeps:
            self._made += made.numel()
        return made if self._one_dtype else made.copy_(scores)


def tile_of(flat: Tensor, begin: int, sizes: Sizes, first: int, last: int) -> Tensor:
    """(BG, n R, t) of a tile that begins at an element of `flat`."""
    lines = (last - first) * sizes.shared
    return flat[begin : begin + sizes.batch * lines * last].view(sizes.batch, lines, last)
