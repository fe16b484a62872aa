"""Tagged words to tokens: the first token of each word learns the word's tag, the others nothing.

Which token is of which word says the fast tokenizer (`word_ids`). A word of which the tokenizer
leaves nothing (a lone control character) becomes the unknown token, so that no word is lost. A
sentence longer than `max_seq_len` is cut between words into windows that share some; each word is
trained and predicted in one of them, that where it stands further from the edge.

    B rows, T tokens, W words a window answers for
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.data.each import encode_each, for_each
from qlora_trainer.data.encode import IGNORED, Example
from qlora_trainer.data.faults import RowError
from qlora_trainer.data.identity import identity_hash
from qlora_trainer.data.labels import label_settings
from qlora_trainer.data.padding import padded
from qlora_trainer.data.rows import Findings
from qlora_trainer.data.tagged_words import TaggedWords, recognise_tagged_words, to_tagged_words
from qlora_trainer.data.tags import check_labels, entity_spans, entity_types
from qlora_trainer.data.windows import cut_windows, frame_of, owners
from qlora_trainer.errors import UserError

_FEW = 5  # entities of a type that hardly teach it


class TaggedWordsEncoder:
    """Turns records into windows of tokens with the tags of their words.

    Args:
        tokenizer: A fast transformers tokenizer.
        labels: Tags in the model's order, or entity types.
        max_seq_len: Longest window, special tokens included.
        over_length: What to do with a single word that no window holds.
        stride: Most tokens that neighbouring windows share; at most half a window is.
        scheme: Of the tags in the data; one of `tags.SCHEMES`.
        numbered: Tags may be numbers, which count the labels from 0.
        labelled: Records have tags.

    Raises:
        UserError: The labels are no tags, or `max_seq_len` holds no word.
    """

    columns: Mapping[str, str] = MappingProxyType({"first": "int32", "tags": "int32"})

    def __init__(
        self,
        tokenizer: Any,
        *,
        labels: Sequence[str],
        max_seq_len: int,
        over_length: str = "raise",
        stride: int = 0,
        scheme: str = "iob2",
        numbered: bool = True,
        labelled: bool = True,
    ) -> None:
        self.tokenizer, self.labels = tokenizer, check_labels(labels)
        self.max_seq_len, self.over_length, self.stride = max_seq_len, over_length, stride
        self.scheme, self.labelled = scheme, labelled
        self._names = self.labels if numbered else None
        self._ids = {name: index for index, name in enumerate(self.labels)}
        self._frame = frame_of(tokenizer, pair=False)
        self._capacity = max_seq_len - self._frame.size
        if self._capacity < 1:
            raise UserError(
                f"data.max_seq_len = {max_seq_len}: the tokenizer's {self._frame.size} special "
                "tokens leave no room for a word; raise it"
            )
        self._spaced = _needs_space(tokenizer)

    @property
    def identity(self) -> str:
        """A hash of all that decides what a record becomes."""
        parts = {
            "labels": self.labels,
            "limits": [self.max_seq_len, self.over_length, self.stride],
            "scheme": [self.scheme, self._names is not None],
            "labelled": self.labelled,
        }
        return identity_hash(parts, self.tokenizer)

    def recognise(self, records: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
        """See that words and tags are there; see `tagged_words.recognise_tagged_words`."""
        return recognise_tagged_words(records, columns, labelled=self.labelled)

    def encode_rows(
        self, records: Sequence[Mapping[str, Any]], format: str
    ) -> list[list[Example] | RowError]:
        """Check records and tokenize those that are right, in one call."""
        return encode_each(for_each(records, self._checked), self._tokenize, self._windows)

    def _checked(self, record: Mapping[str, Any]) -> TaggedWords:
        row = to_tagged_words(record, scheme=self.scheme, names=self._names, labelled=self.labelled)
        for place, tag in enumerate(row.tags):
            if tag not in self._ids:
                raise RowError(
                    f"tag {tag!r} of word {place + 1} ({row.words[place]!r}) is not among the "
                    f"model's labels ({', '.join(self.labels)})",
                    "mend the tag, or list all entity types in task_settings.labels",
                    f"label {tag}",
                )
        return row

    def _tokenize(self, rows: Sequence[TaggedWords]) -> list[list[list[int]]]:
        """The tokens of every word."""
        if not rows:
            return []
        sentences = [row.words for row in rows]
        space = " " if self._spaced else ""
        encoded = self.tokenizer(
            [[words[0], *(space + word for word in words[1:])] for words in sentences],
            is_split_into_words=True,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        results: list[list[list[int]]] = []
        for number, words in enumerate(sentences):
            pieces: list[list[int]] = [[] for _ in words]
            ids = encoded["input_ids"][number]
            for token, word in zip(ids, encoded.word_ids(number), strict=True):
                pieces[word].append(token)
            results.append(pieces)
        return results

    def _windows(self, row: TaggedWords, pieces: list[list[int]]) -> list[Example]:
        for place, piece in enumerate(pieces):
            if not piece:
                pieces[place] = [self._unknown(row.words[place], place)]
        lost = sum(max(0, len(piece) - self._capacity) for piece in pieces)
        if lost and self.over_length != "truncate":
            whole, _ = self._frame.join([token for piece in pieces for token in piece])
            return [Example(whole, columns={"first": [], "tags": []}, too_long=True)]
        pieces = [piece[: self._capacity] for piece in pieces]  # its first token is what counts
        sizes = [len(piece) for piece in pieces]
        windows = cut_windows(sizes, self._capacity, min(self.stride, self._capacity // 2))
        digest = hashlib.sha256(json.dumps(row.words).encode()).hexdigest()[:12]
        examples: list[Example] = []
        for (start, end), (begin, stop) in zip(windows, owners(windows), strict=True):
            ids, _ = self._frame.join([token for piece in pieces[start:end] for token in piece])
            ends = np.cumsum([len(self._frame.parts[0]), *sizes[start:end]])
            words = row.words[begin:stop]
            tags = row.tags[begin:stop] if self.labelled else None
            reference = {"record": digest, "start": begin, "words": words, "tags": tags}
            columns = {
                "first": ends[begin - start : stop - start].tolist(),
                "tags": [self._ids[tag] for tag in tags or []],
            }
            examples.append(Example(ids, columns=columns, reference=reference))
        if lost:
            examples[0] = replace(examples[0], lost_tokens=lost)
        return examples

    def _unknown(self, word: str, place: int) -> int:
        token = self.tokenizer.unk_token_id
        if token is None:
            problem = f"the tokenizer leaves nothing of word {place + 1} ({word!r})"
            raise RowError(problem, "drop the word and its tag", "no token")
        return int(token)

    def collate(self, dataset: EncodedDataset, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Tensors of one micro-batch, padded on the right.

        Returns:
            `input_ids`, `attention_mask`, `labels`, all (B, T) int64. Labels are -100 but at the
            words to be told; where records have no tags they are 0 there.
        """
        batch = padded([dataset.input_ids(row) for row in rows], self.tokenizer.pad_token_id or 0)
        labels = np.full(tuple(batch["input_ids"].shape), IGNORED, np.int64)
        for number, row in enumerate(rows):
            labels[number, dataset.column(row, "first")] = (
                dataset.column(row, "tags") if self.labelled else 0
            )
        return {**batch, "labels": torch.from_numpy(labels)}

    def findings(self, dataset: EncodedDataset) -> Findings:
        """How often each entity type stands in the data."""
        entities: Counter[str] = Counter()
        words = windows = 0
        for index in range(len(dataset)):
            reference = dataset.reference(index)
            words += len(reference["words"])
            windows += reference["start"] > 0
            entities.update(kind for kind, _, _ in entity_spans(reference["tags"] or []))
        facts = [("words", f"{words:,}"), ("tag scheme", self.scheme.upper())]
        if windows:
            facts.append(("further windows of long sentences", f"{windows:,}"))
        if not self.labelled:
            return Findings(facts=facts)
        facts.append(("entities", f"{entities.total():,}"))
        found = Findings(labels=entities.most_common(), facts=facts)
        counts = {kind: entities[kind] for kind in entity_types(self.labels)}
        if rare := [f"{kind} ({count})" for kind, count in counts.items() if count < _FEW]:
            found.warnings.append(f"types with fewer than {_FEW} entities: {', '.join(rare)}")
        return found

    def pieces(self, dataset: EncodedDataset, index: int) -> list[tuple[str, bool]]:
        """The words, entities with their types."""
        reference = dataset.reference(index)
        words, tags = reference["words"], reference["tags"] or []
        shown: list[tuple[str, bool]] = []
        end = 0
        for kind, start, stop in entity_spans(tags):
            shown.append((" ".join([*words[end:start], ""]), False))
            shown += [(" ".join(words[start:stop]), True), (f" [{kind}] ", False)]
            end = stop
        shown.append((" ".join(words[end:]), False))
        return [piece for piece in shown if piece[0]]

    def reference(self, dataset: EncodedDataset, index: int) -> Any:
        """The words a window answers for, where they begin in their record, and their tags."""
        return dataset.reference(index)

    def model_settings(self) -> dict[str, Any]:
        """Labels in the configuration of the model."""
        return label_settings(self.labels)


def _needs_space(tokenizer: Any) -> bool:
    """Whether words apart must be given the space that stands before them in a text."""
    plain = {"add_special_tokens": False, "return_attention_mask": False}
    apart = tokenizer(["a", "a"], is_split_into_words=True, **plain)["input_ids"]
    return bool(apart != tokenizer("a a", **plain)["input_ids"])
