"""Extractive question answering: the span of a context that answers a question, or that none does.

The head gives every token a score as the first and as the last of the answer; the loss is the mean
of both cross-entropies (Devlin et al., BERT, section 4.2), summed over windows. Padding takes no
part in them, so a row is worth the same in every batch. To answer, the best span of context tokens
over all windows of a question is taken, unless "no answer" (first and last on the position that
means so) scores more than `null_threshold` above it, where its score is the least of all windows:
one window that holds the answer is enough (section 4.3, and the official SQuAD 2.0 rules).

B rows, T tokens, K best first and last tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering

from qlora_trainer.data.encode_answers import AnswersEncoder
from qlora_trainer.tasks.answer_metrics import answer_scores
from qlora_trainer.tasks.kind import EncoderInputs, TaskInputs, TaskKind, full_length_inputs
from qlora_trainer.tasks.task import Batch, Scores, needed_mask

_METRICS = ("exact_match", "f1", "has_answer_exact_match", "has_answer_f1", "no_answer_accuracy")
_CANDIDATES = 20  # first and last tokens looked at per window, as in BERT's own script
_KEPT = 5  # spans kept per window
_SAMPLES = 3  # answers shown in the report
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class QuestionAnswering:
    """Extractive question answering of one model.

    Attributes:
        max_answer_tokens: Longest span that is looked for.
        null_threshold: How much more than the best span "no answer" must score.
    """

    max_answer_tokens: int = 30
    null_threshold: float = 0.0

    @property
    def metrics(self) -> Mapping[str, bool]:
        """The loss falls, all else rises."""
        return {"loss": False, **dict.fromkeys(_METRICS, True)}

    @property
    def best_metric(self) -> str:
        """F1 of the answers' words."""
        return "f1"

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Leave out the row numbers and a mask that says nothing."""
        left_out = ("row", "attention_mask")
        kept = {name: value for name, value in batch.items() if name not in left_out}
        return {**kept, **needed_mask(batch)}

    def loss_weight(self, batch: Batch) -> int:
        """Windows."""
        return batch["input_ids"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of first and last token, summed over windows."""
        return self._loss(self._logits(model, batch), batch)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(2, B, T) Scores as first and as last token."""
        output: Any = model(**{name: batch[name] for name in _INPUTS if name in batch})
        logits = torch.stack((output.start_logits, output.end_logits))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if "attention_mask" in batch:
            logits = logits.masked_fill(batch["attention_mask"] == 0, torch.finfo(logits.dtype).min)
        return logits

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        targets = batch["answer"].T.flatten()  # first tokens, then last ones
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / 2

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss, summed."""
        return {"loss": self._loss(self._logits(model, batch), batch)}

    @torch.no_grad()
    def evaluate_rows(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], list[Any]]:
        """The loss, and the best spans of every row, in one pass."""
        logits = self._logits(model, batch)
        return {"loss": self._loss(logits, batch)}, self._spans(logits, batch)

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """Per row the score of no answer, and the best spans as (start, end, score).

        Starts and ends are characters of the context.
        """
        return self._spans(self._logits(model, batch), batch)

    def _spans(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        null = logits.gather(2, batch["no_answer"].expand(2, -1)[..., None]).sum(0).squeeze(1)
        offsets = batch["offsets"]  # (B, T, 2)
        lowest = torch.finfo(logits.dtype).min
        inside = logits.masked_fill(offsets[..., 0] < 0, lowest)
        count = min(_CANDIDATES, logits.shape[2])
        values, places = inside.topk(count, dim=2)  # (2, B, K)
        length = places[1][:, None, :] - places[0][:, :, None]  # (B, K, K)
        scores = values[0][:, :, None] + values[1][:, None, :]
        allowed = (length >= 0) & (length < self.max_answer_tokens)
        allowed &= (values[0][:, :, None] > lowest) & (values[1][:, None, :] > lowest)
        scores = scores.masked_fill(~allowed, lowest)
        best, order = scores.flatten(1).topk(min(_KEPT, count * count), dim=1)
        first = places[0].gather(1, order // count)
        last = places[1].gather(1, order % count)
        starts = offsets[..., 0].gather(1, first).tolist()
        ends = offsets[..., 1].gather(1, last).tolist()
        found = zip(starts, ends, best.tolist(), null.tolist(), strict=True)
        return [
            {
                "null": nothing,
                "spans": [list(span) for span in zip(*row, strict=True) if span[2] > lowest],
            }
            for *row, nothing in found
        ]

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
        """Exact match and F1 of SQuAD, over questions."""
        answered = self._answered(predictions, references)
        texts = [answer["answer"] for answer, _ in answered]
        values, counts = answer_scores(texts, [reference["answers"] for _, reference in answered])
        lines = [f"{name:<24} {value:7.2f}" for name, value in values.items()]
        lines += [f"{name.replace('_', ' '):<24} {count:7d}" for name, count in counts.items()]
        for answer, reference in answered[:_SAMPLES]:
            right = " | ".join(reference["answers"]) or "(no answer)"
            lines += ["", f"asked:   {reference['question']}", f"right:   {right}"]
            lines.append(f"said:    {answer['answer'] or '(no answer)'}")
        return Scores(values, "\n".join(lines))

    def tell(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[dict[str, Any]]:
        """Per question the answer, where it stands and how probable it is, and others."""
        return [answer for answer, _ in self._answered(predictions, references)]

    def _answered(
        self, predictions: Sequence[Any], references: Sequence[Any]
    ) -> list[tuple[dict[str, Any], Any]]:
        return [
            (self._answer(windows, reference), reference)
            for windows, reference in join_windows(predictions, references)
        ]

    def _answer(self, windows: Sequence[Any], reference: Any) -> dict[str, Any]:
        context = reference["context"]
        null = min(window["null"] for window in windows)
        best: dict[tuple[int, int], float] = {}
        for window in windows:
            for start, end, score in window["spans"]:
                best[start, end] = max(score, best.get((start, end), -math.inf))
        ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:_KEPT]
        nothing = not ranked or null - ranked[0][1] > self.null_threshold
        top = max([null, *(score for _, score in ranked)])
        total = math.exp(null - top) + sum(math.exp(score - top) for _, score in ranked)
        said = []
        for (start, end), score in ranked:
            text = context[start:end]
            start += len(text) - len(text.lstrip())
            share = round(math.exp(score - top) / total, 4)
            text = text.strip()
            said.append({"text": text, "start": start, "end": start + len(text), "share": share})
        share = round(math.exp(null - top) / total, 4)
        chosen = {"text": "", "start": None, "end": None, "share": share} if nothing else said[0]
        return {
            "id": reference["id"],
            "question": reference["question"],
            "answer": chosen["text"],
            "start": chosen["start"],
            "end": chosen["end"],
            "probability": chosen["share"],
            "no_answer_probability": share,
            "candidates": [{"text": item["text"], "probability": item["share"]} for item in said],
        }


def join_windows(
    predictions: Sequence[Any], references: Sequence[Any]
) -> list[tuple[list[Any], Any]]:
    """The predictions of each question's windows, and its reference.

    A window whose neighbour is missing (the two sides of a held-out part) is a question by itself.
    """
    questions: list[tuple[list[Any], Any]] = []
    before: tuple[str, int] | None = None
    for prediction, reference in zip(predictions, references, strict=True):
        record, number = reference["record"], reference["window"]
        if number and before == (record, number - 1):
            questions[-1][0].append(prediction)
        else:
            questions.append(([prediction], reference))
        before = (record, number)
    return questions


def _encoder(inputs: EncoderInputs) -> AnswersEncoder:
    return AnswersEncoder(
        inputs.tokenizer,
        max_seq_len=inputs.max_seq_len,
        over_length=inputs.over_length,
        stride=inputs.settings["stride"],
        max_answer_tokens=inputs.settings["max_answer_len"],
        types=getattr(inputs.config, "type_vocab_size", None) or 0,
        labelled=inputs.labelled,
    )


def _task(inputs: TaskInputs) -> QuestionAnswering:
    return QuestionAnswering(inputs.settings["max_answer_len"], inputs.settings["null_threshold"])


def weightless_batch(
    config: Any, *, rows: int, tokens: int, padded: bool, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Windows of full length."""
    typed = (getattr(config, "type_vocab_size", None) or 0) > 1
    return {
        **full_length_inputs(rows, tokens, padded=padded, typed=typed),
        "offsets": torch.zeros((rows, tokens, 2), dtype=torch.int64),
        "no_answer": torch.zeros(rows, dtype=torch.int64),
        "answer": torch.zeros((rows, 2), dtype=torch.int64),
    }


KIND = TaskKind(
    name="question-answering",
    auto_class=AutoModelForQuestionAnswering,
    peft_type="QUESTION_ANS",
    make_encoder=_encoder,
    make_task=_task,
    weightless_batch=weightless_batch,
    new_head=True,
    loss_unit="window",
)
