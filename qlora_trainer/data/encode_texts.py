"""Texts, or pairs of them, to tokens with a label: what a sequence classifier reads.

The tokenizer puts its own special tokens around one text or between two. A text that is too long is
cut by the tokenizer (of a pair the longer one first), so that what ends it stays. A decoder finds
the end of a text as the last token that is not padding: a row that ends with the padding token
itself is refused.

B rows, T tokens, K labels
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.data.each import encode_each, for_each
from qlora_trainer.data.encode import Example, choose_pad_id
from qlora_trainer.data.faults import RowError
from qlora_trainer.data.identity import identity_hash
from qlora_trainer.data.labelled_texts import (
    LabelledText,
    Problem,
    check_record,
    label_values,
    recognise_labelled_texts,
)
from qlora_trainer.data.labels import label_settings
from qlora_trainer.data.padding import padded
from qlora_trainer.data.rows import Findings

PROBLEM_TYPES: dict[Problem, str] = {  # as transformers calls them
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
_FEW_ROWS = 10  # of a label hardly teach it
_Tokens = tuple[list[int], list[int], int]  # ids, token types, how many tokens were cut


class LabelledTextsEncoder:
    """Turns records into examples for one tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        problem: What labels are.
        labels: Their names in the model's order; none for a regression.
        max_seq_len: Most tokens of an example.
        over_length: `truncate` cuts; the rest is the length policy's.
        labelled: Records have labels.
    """

    columns: Mapping[str, str] = MappingProxyType({"label": "float32", "token_types": "uint8"})

    def __init__(
        self,
        tokenizer: Any,
        *,
        problem: Problem,
        labels: Sequence[str],
        max_seq_len: int,
        over_length: str = "raise",
        labelled: bool = True,
    ) -> None:
        self.tokenizer, self.problem, self.labels = tokenizer, problem, list(labels)
        self.max_seq_len, self.over_length, self.labelled = max_seq_len, over_length, labelled
        self.pad_id = choose_pad_id(tokenizer)
        self._typed = "token_type_ids" in tokenizer.model_input_names

    @property
    def identity(self) -> str:
        """A hash of all that decides what a record becomes."""
        parts = {
            "problem": self.problem,
            "labels": self.labels,
            "limits": [self.max_seq_len, self.over_length, self.labelled],
        }
        return identity_hash(parts, self.tokenizer)

    def recognise(self, records: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
        """Find texts and labels; see `recognise_labelled_texts`."""
        return recognise_labelled_texts(records, columns, labelled=self.labelled)

    def encode_rows(
        self, records: Sequence[Mapping[str, Any]], format: str
    ) -> list[list[Example] | RowError]:
        """Encode records, single texts in one tokenizer call and pairs in another."""
        rows = for_each(records, self._checked)
        return encode_each(rows, self._tokenize_all, self._example)

    def _checked(self, record: Mapping[str, Any]) -> tuple[LabelledText, list[float]]:
        row = check_record(record, labelled=self.labelled)
        values = label_values(row.label, self.problem, self.labels) if self.labelled else []
        return row, values

    def _tokenize_all(self, rows: list[tuple[LabelledText, list[float]]]) -> list[_Tokens]:
        found: dict[int, _Tokens] = {}
        for is_pair in (False, True):
            texts = {n: row for n, (row, _) in enumerate(rows) if (row.pair is not None) == is_pair}
            tokens = self._tokenize(
                [row.text for row in texts.values()],
                [row.pair or "" for row in texts.values()] if is_pair else None,
            )
            found.update(zip(texts, tokens, strict=True))
        return [found[number] for number in range(len(rows))]

    def _tokenize(self, texts: list[str], pairs: list[str] | None) -> Iterator[_Tokens]:
        if not texts:
            return
        encoded = self.tokenizer(texts, pairs, return_attention_mask=False, verbose=False)
        for number, ids in enumerate(encoded["input_ids"]):
            types = encoded["token_type_ids"][number] if self._typed else []
            lost = 0
            if len(ids) > self.max_seq_len and self.over_length == "truncate":
                pair = None if pairs is None else pairs[number]
                cut = self.tokenizer(
                    texts[number], pair, truncation=True, max_length=self.max_seq_len
                )
                lost = len(ids) - len(cut["input_ids"])
                ids, types = cut["input_ids"], cut.get("token_type_ids", [])
            yield list(ids), list(types), lost

    def _example(self, row: tuple[LabelledText, list[float]], tokens: _Tokens) -> list[Example]:
        ids, types, lost = tokens
        if not ids:
            remedy = "write a text that the tokenizer knows, or drop the row"
            raise RowError("the tokenizer leaves nothing of the text", remedy, "no tokens")
        if ids[-1] == self.pad_id:
            remedy = "remove it from the end of the text"
            raise RowError("ends with the padding token", remedy, "ends with padding")
        columns: dict[str, list[float] | list[int]] = {
            "label": row[1],
            "token_types": types if any(types) else [],
        }
        return [Example(ids, columns=columns, lost_tokens=lost)]

    def collate(self, dataset: EncodedDataset, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Tensors of some rows, padded on the right.

        Returns:
            `input_ids`, `attention_mask`, for models that take them `token_type_ids` (B, T) int64;
            `targets`: (B,) int64 of one label, (B, K) fp32 of several, (B,) fp32 of a regression.
        """
        batch = padded([dataset.input_ids(index) for index in rows], self.pad_id)
        if self._typed:
            types = torch.zeros_like(batch["input_ids"])
            for number, index in enumerate(rows):
                found = dataset.column(index, "token_types").astype(np.int64)
                types[number, : len(found)] = torch.from_numpy(found)
            batch["token_type_ids"] = types
        if self.labelled:
            values = np.stack([dataset.column(index, "label") for index in rows])  # (B, K or 1)
            targets = torch.from_numpy(values)
            batch["targets"] = targets if self.problem == "multi" else targets[:, 0]
            if self.problem == "single":
                batch["targets"] = batch["targets"].long()
        return batch

    def findings(self, dataset: EncodedDataset) -> Findings:
        """The balance of the labels, or the spread of the numbers."""
        if self.problem == "regression":
            numbers = np.array([dataset.column(i, "label")[0] for i in range(len(dataset))])
            spread = f"{numbers.min():g} to {numbers.max():g}, mean {numbers.mean():g}"
            constant = ["every row has the same number: there is nothing to learn"]
            return Findings(
                facts=[("problem", "regression"), ("numbers", spread)],
                warnings=constant if numbers.min() == numbers.max() else [],
            )
        counts = Counter(dict.fromkeys(self.labels, 0))
        for index in range(len(dataset)):
            counts.update(self.labels[place] for place in self._places(dataset, index))
        warnings = []
        few = [name for name, rows in counts.items() if rows < _FEW_ROWS]
        if few:
            shown = ", ".join(f"{name!r} ({counts[name]})" for name in few[:5])
            warnings.append(f"labels with fewer than {_FEW_ROWS} rows: {shown}; hardly learned")
        name, most = counts.most_common(1)[0]
        if self.problem == "single" and most > 0.9 * len(dataset):
            warnings.append(
                f"{most} of {len(dataset)} rows have the label {name!r}; see "
                "task_settings.class_weights and evaluation.metric: macro_f1"
            )
        return Findings(counts.most_common(), [("problem", f"{self.problem} label")], warnings)

    def _places(self, dataset: EncodedDataset, index: int) -> list[int]:
        values = dataset.column(index, "label")
        return [int(values[0])] if self.problem == "single" else np.flatnonzero(values).tolist()

    def pieces(self, dataset: EncodedDataset, index: int) -> list[tuple[str, bool]]:
        """The text, and behind an arrow what is said of it."""
        text = self.tokenizer.decode(dataset.input_ids(index).tolist())
        if self.problem == "regression":
            return [(f"{text} -> ", False), (f"{dataset.column(index, 'label')[0]:g}", True)]
        names = ", ".join(self.labels[place] for place in self._places(dataset, index))
        return [(f"{text} -> ", False), (names or "(none)", True)]

    def reference(self, dataset: EncodedDataset, index: int) -> Any:
        """The class, the list of classes, or the number; None of a row without a label."""
        if not self.labelled:
            return None
        if self.problem == "regression":
            return float(dataset.column(index, "label")[0])
        places = self._places(dataset, index)
        return places[0] if self.problem == "single" else places

    def model_settings(self) -> dict[str, Any]:
        """Label names, the kind of problem, and the padding that ends a decoder's text."""
        return {
            **label_settings(self.labels or ["value"]),
            "problem_type": PROBLEM_TYPES[self.problem],
            "pad_token_id": self.pad_id,
        }
