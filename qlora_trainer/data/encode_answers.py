"""Questions on contexts to tokens: question first, then as much of the context as fits.

A context that does not fit is cut into windows that share `stride` tokens, each with the whole
question, and every one is a row. A window that holds an answer whole learns its first and last
token; one that does not learns the position that means "no answer" (the tokenizer's CLS token, or
the first position), as unanswerable questions do (Devlin et al., BERT, section 4.3).

    B rows, T tokens, C context tokens of a window
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from qlora_trainer.data.answers import Asked, Spans, held_answer, recognise_questions, to_asked
from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.data.each import encode_each, for_each
from qlora_trainer.data.encode import Example
from qlora_trainer.data.faults import RowError
from qlora_trainer.data.identity import identity_hash
from qlora_trainer.data.padding import pad_rows, padded
from qlora_trainer.data.rows import Findings
from qlora_trainer.data.windows import cut_windows, frame_of

_LEAST_CONTEXT = 8  # tokens of context a window must hold, or it tells nothing

_Tokens = tuple[list[int], Spans]


class AnswersEncoder:
    """Turns records into windows of tokens with the places of their answers.

    Args:
        tokenizer: A fast transformers tokenizer.
        max_seq_len: Longest window, question and special tokens included.
        over_length: What to do with a question that leaves no room for its context.
        stride: Tokens that neighbouring windows share; at most half of what a window holds is.
        max_answer_tokens: Longest answer that is looked for; longer ones are warned of.
        types: Token types the model tells apart.
        labelled: Records have answers.

    Raises:
        UserError: The tokenizer is not a fast one.
    """

    columns: Mapping[str, str] = MappingProxyType(
        {"types": "int32", "context": "int32", "offsets": "int32", "answer": "int32"}
    )

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_seq_len: int,
        over_length: str = "raise",
        stride: int = 128,
        max_answer_tokens: int = 30,
        types: int = 2,
        labelled: bool = True,
    ) -> None:
        self.tokenizer, self.labelled = tokenizer, labelled
        self.max_seq_len, self.over_length, self.stride = max_seq_len, over_length, stride
        self.max_answer_tokens = max_answer_tokens
        self._frame = frame_of(tokenizer, pair=True)
        self.typed = self._frame.typed and types > 1
        before = list(self._frame.parts[0])
        cls = tokenizer.cls_token_id
        self._no_answer = before.index(cls) if cls in before else 0

    @property
    def identity(self) -> str:
        """A hash of all that decides what a record becomes."""
        limits = [self.max_seq_len, self.over_length, self.stride]
        parts = {"limits": limits, "typed": self.typed, "labelled": self.labelled}
        return identity_hash(parts, self.tokenizer)

    def recognise(self, records: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
        """See that questions, contexts and answers are there."""
        return recognise_questions(records, columns, labelled=self.labelled)

    def encode_rows(
        self, records: Sequence[Mapping[str, Any]], format: str
    ) -> list[list[Example] | RowError]:
        """Check records and tokenize those that are right, in two calls."""
        rows = for_each(records, lambda record: to_asked(record, labelled=self.labelled))
        return encode_each(rows, self._tokenize_both, self._windows)

    def _tokenize_both(self, rows: Sequence[Asked]) -> Iterator[tuple[_Tokens, _Tokens]]:
        questions = self._tokenize([row.question for row in rows])
        return zip(questions, self._tokenize([row.context for row in rows]), strict=True)

    def _tokenize(self, texts: list[str]) -> list[_Tokens]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [(list(ids), list(offsets)) for ids, offsets in pairs]

    def _windows(self, asked: Asked, tokens: tuple[_Tokens, _Tokens]) -> list[Example]:
        (question, _), (context, offsets) = tokens
        if not context:
            raise RowError(
                "the tokenizer knows no character of `context`",
                "take a model of this language, or drop the row",
                "unknown characters",
            )
        question, lost, whole = self._fit(question)
        room = len(context) if not whole else self.max_seq_len - self._frame.size - len(question)
        windows = cut_windows([1] * len(context), room, min(self.stride, room // 2))
        parts = json.dumps([asked.id, asked.question, asked.context]).encode()
        reference = {
            "record": hashlib.sha256(parts).hexdigest()[:12],
            "id": asked.id,
            "question": asked.question,
            "context": asked.context,
            "answers": list(asked.answers) if self.labelled else None,
            "starts": list(asked.starts) if self.labelled else None,
        }
        examples = []
        for number, (start, end) in enumerate(windows):
            ids, types = self._frame.join(question, context[start:end])
            first = len(self._frame.parts[0]) + len(question) + len(self._frame.parts[1])
            spans = offsets[start:end]
            columns: dict[str, Any] = {
                "types": types if self.typed else [],
                "context": [first, first + len(spans)],
                "offsets": [bound for span in spans for bound in span],
                "answer": self._answer(asked, spans, first) if self.labelled else [],
            }
            told = {**reference, "window": number}
            examples.append(Example(ids, columns=columns, reference=told, too_long=not whole))
        return [replace(examples[0], lost_tokens=lost), *examples[1:]] if lost else examples

    def _fit(self, question: list[int]) -> tuple[list[int], int, bool]:
        """The question as it is kept, what was cut of it, and whether it leaves room."""
        most = self.max_seq_len - self._frame.size - _LEAST_CONTEXT
        if len(question) <= most:
            return question, 0, True
        if self.over_length == "drop":
            return question, 0, False
        if self.over_length == "truncate" and most > 0:
            return question[:most], len(question) - most, True
        raise RowError(
            f"its question has {len(question)} tokens, which leave less than {_LEAST_CONTEXT} for "
            f"the context within data.max_seq_len = {self.max_seq_len}",
            "raise data.max_seq_len, shorten the question, or set data.over_length: drop or "
            "truncate (which cuts its end)",
            "long question",
        )

    def _answer(self, asked: Asked, spans: Spans, first: int) -> list[int]:
        """First and last position of the answer a window holds, or of no answer."""
        held = held_answer(asked, spans)
        return [first + token for token in held] if held else [self._no_answer, self._no_answer]

    def collate(self, dataset: EncodedDataset, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Tensors of one micro-batch, padded on the right, all int64.

        Returns:
            `input_ids`, `attention_mask` (B, T); `token_type_ids` (B, T) where the model tells
            types apart; `offsets` (B, T, 2): characters of each context token, (-1, -1) elsewhere;
            `no_answer` (B,): the position that means so; where records have answers
            `answer` (B, 2): first and last position of the answer.
        """
        batch = padded([dataset.input_ids(row) for row in rows], self.tokenizer.pad_token_id or 0)
        offsets = np.full((*batch["input_ids"].shape, 2), -1, np.int64)
        for number, row in enumerate(rows):
            first, last = dataset.column(row, "context")
            offsets[number, first:last] = dataset.column(row, "offsets").reshape(-1, 2)
        batch["offsets"] = torch.from_numpy(offsets)
        batch["no_answer"] = torch.full((len(rows),), self._no_answer, dtype=torch.int64)
        if self.typed:
            batch["token_type_ids"] = pad_rows([dataset.column(row, "types") for row in rows], 0)
        if self.labelled:
            answers = np.stack([dataset.column(row, "answer") for row in rows]).astype(np.int64)
            batch["answer"] = torch.from_numpy(answers)
        return batch

    def findings(self, dataset: EncodedDataset) -> Findings:
        """How many questions have an answer, and which answers can never be found whole."""
        questions = windows = answered = 0
        long, lost = list[str](), list[str]()
        place, seen, held = "", False, False
        for index in range(len(dataset)):
            reference = dataset.reference(index)
            windows += 1
            if reference["window"] == 0:
                if seen and not held:
                    lost.append(place)
                questions, place = questions + 1, dataset.where(index)
                seen, held = bool(reference["answers"]), False
                answered += seen
            if not self.labelled:
                continue
            first, last = dataset.column(index, "answer").tolist()
            held = held or first != self._no_answer
            if last - first >= self.max_answer_tokens:
                long.append(dataset.where(index))
        if seen and not held:
            lost.append(place)
        facts = [("questions", f"{questions:,}"), ("windows", f"{windows:,}")]
        if not self.labelled:
            return Findings(facts=facts)
        found = Findings([("answer", answered), ("no answer", questions - answered)], facts)
        if lost:
            found.warnings.append(
                f"answers that no window holds whole, so they are trained as no answer: {len(lost)}"
                f" (first: {lost[0]}); raise data.max_seq_len or task_settings.stride"
            )
        if long:
            found.warnings.append(
                f"answers longer than task_settings.max_answer_len = {self.max_answer_tokens}, "
                f"which are never looked for: {len(long)} (first: {long[0]})"
            )
        return found

    def pieces(self, dataset: EncodedDataset, index: int) -> list[tuple[str, bool]]:
        """Question and context, the answer learned."""
        reference = dataset.reference(index)
        shown, context = [(reference["question"] + "\n", False)], reference["context"]
        spans = dataset.column(index, "offsets").reshape(-1, 2)
        start, end = int(spans[0][0]), int(spans[-1][1])
        answer = dataset.column(index, "answer").tolist() if self.labelled else []
        if not answer or answer[0] == self._no_answer:
            return [*shown, (context[start:end], False), (" (no answer)", bool(answer))]
        first = int(dataset.column(index, "context")[0])
        begin, stop = int(spans[answer[0] - first][0]), int(spans[answer[1] - first][1])
        parts = [(start, begin, False), (begin, stop, True), (stop, end, False)]
        return shown + [(context[a:b], learned) for a, b, learned in parts if a < b]

    def reference(self, dataset: EncodedDataset, index: int) -> Any:
        """Question, context and answers of a window, and which window of its record it is."""
        return dataset.reference(index)

    def model_settings(self) -> dict[str, Any]:
        """Nothing: the head always has two outputs, first and last."""
        return {}
