"""Character spans to token positions.

The whole text is tokenized once, and a fast tokenizer's offsets say which characters each token
covers: a token is trained if it covers a trained character.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from qlora_trainer.data.template import Rendered
from qlora_trainer.data.template_text import special_pattern
from qlora_trainer.errors import UserError

# Ids of a text, and its spans in tokens with whether a token straddles their start.
Tokenized = tuple[list[int], list[tuple[int, int, bool]]]


class SpanTokenizer:
    """Tokenizes rendered texts with their spans."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = special_pattern(tokenizer)
        self._alone = lru_cache(maxsize=1024)(self.tokenize_alone)  # most prompts end alike

    def tokenize(self, parts: Sequence[Rendered]) -> list[Tokenized]:
        """Every text in one call."""
        if not parts:
            return []
        texts = [part.text for part in parts]
        plain = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        if not self.tokenizer.is_fast:
            every = self.tokenizer(texts, **plain)["input_ids"]
            return [
                (
                    list(ids),
                    [self._span_by_prefix(part.text, ids, span) for span in part.spans],
                )
                for ids, part in zip(every, parts, strict=True)
            ]
        batch = self.tokenizer(texts, return_offsets_mapping=True, **plain)
        found = []
        for ids, offsets, part in zip(
            batch["input_ids"], batch["offset_mapping"], parts, strict=True
        ):
            spans = []
            for span in part.spans:
                start, end = _token_span(offsets, span)
                spans.append((start, end, not self._joins(part.text, ids, offsets, span[0], start)))
            found.append((list(ids), spans))
        return found

    def tokenize_alone(self, text: str) -> list[int]:
        """The ids of a text, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _joins(
        self,
        text: str,
        ids: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        cut: int,
        position: int,
    ) -> bool:
        """Whether the text before character `cut` is tokenized as it would be without the rest.

        Special tokens split the text, so only what follows the last of them is compared.
        """
        if not cut:
            return True
        begin = 0
        for match in self._special.finditer(text, 0, cut):
            begin = match.start()
        first = bisect_left(offsets, begin, key=lambda offset: offset[0])
        return list(ids[first:position]) == self._alone(text[begin:cut])

    def _span_by_prefix(
        self, text: str, ids: Sequence[int], span: tuple[int, int]
    ) -> tuple[int, int, bool]:
        """A slow tokenizer gives no offsets: the ids of the text before must begin the whole."""
        bounds = []
        for end in span:
            head = self.tokenizer(text[:end], add_special_tokens=False, verbose=False)["input_ids"]
            if list(ids[: len(head)]) != list(head):
                raise UserError(
                    "this tokenizer is a slow one that merges prompt and answer into one token, so "
                    "what is trained cannot be told; use a model with a fast tokenizer "
                    "(tokenizer.json)"
                )
            bounds.append(len(head))
        return bounds[0], bounds[1], False


def _token_span(offsets: Sequence[tuple[int, int]], span: tuple[int, int]) -> tuple[int, int]:
    """The tokens that cover the characters of `span`, as a range of positions.

    >>> _token_span([(0, 2), (2, 5), (5, 6)], (3, 6))
    (1, 3)
    """
    start = bisect_right(offsets, span[0], key=lambda offset: offset[1])
    end = bisect_left(offsets, span[1], key=lambda offset: offset[0])
    return start, end
