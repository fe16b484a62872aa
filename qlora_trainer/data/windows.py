"""Long inputs in windows: where each is cut, and the special tokens around it.

A window is a range of items (tokens, or words of several tokens) that fits. Windows share some
tokens, so that nothing stands at an edge in all of them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_trainer.errors import UserError


def cut_windows(sizes: Sequence[int], capacity: int, overlap: int) -> list[tuple[int, int]]:
    """Ranges of items that cover all of them, each within the capacity.

    Neighbours share as many whole items as fit into the overlap. A window always brings at least
    one new item, and one that exceeds the capacity alone is a window alone.

    Args:
        sizes: Tokens of every item.
        capacity: Most tokens of a window.
        overlap: Most tokens two neighbours share.

    >>> cut_windows([1] * 10, 4, 2)
    [(0, 4), (2, 6), (4, 8), (6, 10)]
    """
    windows: list[tuple[int, int]] = []
    start = end = 0
    while True:
        used = sum(sizes[start:end])
        while end < len(sizes) and used + sizes[end] <= capacity:
            used += sizes[end]
            end += 1
        if end == start and end < len(sizes):
            end += 1  # too large by itself
        windows.append((start, end))
        if end >= len(sizes):
            return windows
        start, shared = end, 0
        while start - 1 > windows[-1][0] and shared + sizes[start - 1] <= overlap:
            start -= 1
            shared += sizes[start]
        while start < end and sum(sizes[start : end + 1]) > capacity:
            start += 1  # the shared items must leave room for a new one


def owners(windows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The items each window answers for: every item once, shared ones by the nearer middle.

    >>> owners([(0, 4), (2, 6), (4, 8)])
    [(0, 3), (3, 5), (5, 8)]
    """
    cuts = [windows[0][0]]
    for (_, end), (start, _) in itertools.pairwise(windows):
        cuts.append((start + end + 1) // 2 if start < end else end)
    cuts.append(windows[-1][1])
    return list(itertools.pairwise(cuts))


@dataclass(frozen=True)
class Frame:
    """The special tokens a tokenizer puts around one text, or around a pair.

    Attributes:
        parts: Ids before the first text, (between both,) after the last.
        part_types: Token types of the special ids, likewise.
        text_types: Token type of each text.
    """

    parts: tuple[tuple[int, ...], ...]
    part_types: tuple[tuple[int, ...], ...]
    text_types: tuple[int, ...]

    @property
    def size(self) -> int:
        """Special tokens in all."""
        return sum(map(len, self.parts))

    @property
    def typed(self) -> bool:
        """Whether token types say anything."""
        return any(self.text_types) or any(map(any, self.part_types))

    def join(self, *texts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids and token types of texts inside the frame."""
        ids, types = list(self.parts[0]), list(self.part_types[0])
        for index, text in enumerate(texts):
            ids += [*text, *self.parts[index + 1]]
            types += [self.text_types[index]] * len(text) + list(self.part_types[index + 1])
        return ids, types


def frame_of(tokenizer: Any, *, pair: bool) -> Frame:
    """See what a tokenizer puts around texts.

    Raises:
        UserError: It is not a fast one, which alone knows where its tokens come from.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) is not a fast one, which alone tells "
            "where a token stands in the text; take a model with a tokenizer.json"
        )
    encoded = tokenizer("a", "a") if pair else tokenizer("a")
    ids = encoded["input_ids"]
    types = encoded.get("token_type_ids") or [0] * len(ids)
    parts: list[list[int]] = [[]]
    part_types: list[list[int]] = [[]]
    text_types: list[int] = []
    before: int | None = None
    for token, kind, side in zip(ids, types, encoded.sequence_ids(0), strict=True):
        if side is None:
            parts[-1].append(token)
            part_types[-1].append(kind)
        elif side != before:
            parts.append([])
            part_types.append([])
            text_types.append(kind)
        before = side
    return Frame(tuple(map(tuple, parts)), tuple(map(tuple, part_types)), tuple(text_types))
