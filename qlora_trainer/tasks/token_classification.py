"""A tag for every word: named entities by a trained head on each word's first token.

The loss is the cross-entropy summed over the words a batch answers for, each word once whatever
the windows. What is scored is entities, not tags; see `entity_metrics`. Windows of one sentence
are put together again before, so an entity across their border counts whole.

B rows, T tokens, W words of the batch, C labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from qlora_trainer.data.encode import IGNORED
from qlora_trainer.data.encode_tagged_words import TaggedWordsEncoder
from qlora_trainer.data.faults import RowError
from qlora_trainer.data.tagged_words import to_tagged_words
from qlora_trainer.data.tags import check_labels, entity_spans, label_names
from qlora_trainer.errors import UserError
from qlora_trainer.tasks.entity_metrics import averages, count_entities, entity_report
from qlora_trainer.tasks.kind import EncoderInputs, TaskInputs, TaskKind, full_length_inputs
from qlora_trainer.tasks.labels import balanced_weights, count_labels, head_labels
from qlora_trainer.tasks.task import Batch, Scores, needed_mask

_METRICS = (
    "accuracy",
    "precision",
    "recall",
    "f1",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "weighted_f1",
)


@dataclass(frozen=True)
class TokenClassification:
    """The tagging task of one model.

    Attributes:
        labels: Tags in the order of the head's outputs.
        class_weights: (C,) What a word of each label counts in the loss; None: all the same.
    """

    labels: tuple[str, ...]
    class_weights: Tensor | None = None

    @property
    def metrics(self) -> Mapping[str, bool]:
        """The loss falls, all else rises."""
        return {"loss": False, **dict.fromkeys(_METRICS, True)}

    @property
    def best_metric(self) -> str:
        """F1 over all entities."""
        return "f1"

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Find the words' positions; drop a mask that says nothing."""
        labels = batch["labels"].reshape(-1)
        positions = (labels != IGNORED).nonzero().squeeze(1)  # (W,)
        return {
            "input_ids": batch["input_ids"],
            "loss_positions": positions,
            "loss_targets": labels.index_select(0, positions),
            **needed_mask(batch),
        }

    def loss_weight(self, batch: Batch) -> int:
        """Words."""
        return batch["loss_targets"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy summed over the words."""
        return self._loss(self._logits(model, batch), batch)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        logits: Tensor = model(**inputs).logits  # (B, T, C)
        logits = logits.flatten(0, 1).index_select(0, batch["loss_positions"])  # (W, C)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        weights = self.class_weights
        if weights is not None:
            weights = weights.to(logits)
        return nn.functional.cross_entropy(
            logits, batch["loss_targets"], weight=weights, reduction="sum"
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss and right tags, summed."""
        return self._sums(self._logits(model, batch), batch)

    def _sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        right = (logits.argmax(1) == batch["loss_targets"]).sum()
        return {"loss": self._loss(logits, batch), "accuracy": right}

    @torch.no_grad()
    def evaluate_rows(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], list[Any]]:
        """Sums, and the tags of every row, in one pass."""
        logits = self._logits(model, batch)
        return self._sums(logits, batch), self._rows(logits, batch)

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """Per row the tags of its words, and how probable each is."""
        return self._rows(self._logits(model, batch), batch)

    def _rows(self, logits: Tensor, batch: Batch) -> list[dict[str, list[Any]]]:
        share, index = logits.softmax(1).max(1)
        rows, width = batch["input_ids"].shape
        counts = torch.bincount(batch["loss_positions"] // width, minlength=rows).tolist()
        tags = [self.labels[number] for number in index.tolist()]
        shares, results, start = share.tolist(), [], 0
        for count in counts:
            results.append(
                {"tags": tags[start : start + count], "shares": shares[start : start + count]}
            )
            start += count
        return results

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
        """Precision, recall and F1 over entities."""
        sentences = join_windows(predictions, references)
        scores = count_entities(
            [sentence["predicted"] for sentence in sentences],
            [sentence["tags"] for sentence in sentences],
        )
        return Scores(averages(scores), entity_report(scores))

    def tell(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[dict[str, Any]]:
        """Per sentence its words, their tags, and its entities with their share of certainty."""
        told = []
        for sentence in join_windows(predictions, references):
            words, tags, shares = sentence["words"], sentence["predicted"], sentence["shares"]
            entities = [
                {
                    "type": kind,
                    "text": " ".join(words[start:end]),
                    "start": start,
                    "end": end,
                    "probability": round(min(shares[start:end]), 4),
                }
                for kind, start, end in entity_spans(tags)
            ]
            told.append({"tokens": words, "tags": tags, "entities": entities})
        return told


def join_windows(predictions: Sequence[Any], references: Sequence[Any]) -> list[dict[str, Any]]:
    """Sentences again, from the windows they were cut into.

    A window whose neighbour is missing (the two sides of a held-out part) is a sentence by itself.

    Returns:
        Each with `words`, `tags`, `predicted` and `shares`.
    """
    sentences: list[dict[str, Any]] = []
    record, end = None, 0
    for prediction, reference in zip(predictions, references, strict=True):
        start, words = reference["start"], reference["words"]
        if not (start and sentences and record == reference["record"] and start == end):
            sentences.append({"words": [], "tags": [], "predicted": [], "shares": []})
        sentence = sentences[-1]
        sentence["words"] += words
        sentence["tags"] += reference["tags"] or []
        sentence["predicted"] += prediction["tags"]
        sentence["shares"] += prediction["shares"]
        record, end = reference["record"], start + len(words)
    return sentences


def found_labels(inputs: EncoderInputs) -> list[str]:
    """The labels the run file lists, or those of the training rows.

    Raises:
        UserError: No training row has a tag that can be read, or none marks an entity.
    """
    if inputs.settings["labels"] is not None:
        return check_labels(inputs.settings["labels"])
    tags: set[str] = set()
    for record in inputs.training_rows():
        try:
            tags.update(to_tagged_words(record, scheme=inputs.settings["tag_scheme"]).tags)
        except RowError:
            continue  # told with its place when the row is encoded
    names = label_names(tags)
    if tags and len(names) == 1:
        raise UserError(
            "no training row marks an entity: every tag is O; give rows with B-TYPE and I-TYPE, or "
            "list the types in task_settings.labels"
        )
    return names


def _encoder(inputs: EncoderInputs) -> TaggedWordsEncoder:
    return TaggedWordsEncoder(
        inputs.tokenizer,
        labels=found_labels(inputs),
        max_seq_len=inputs.max_seq_len,
        over_length=inputs.over_length,
        stride=inputs.settings["stride"],
        scheme=inputs.settings["tag_scheme"],
        numbered=inputs.settings["labels"] is not None,
        labelled=inputs.labelled,
    )


def _task(inputs: TaskInputs) -> TokenClassification:
    labels = head_labels(inputs.model.config)
    weights = None
    if inputs.settings["class_weights"] == "balanced" and inputs.train is not None:
        weights = balanced_weights(count_labels(inputs.train, "tags", len(labels)))
    return TokenClassification(labels, weights)


def weightless_batch(
    config: Any, *, rows: int, tokens: int, padded: bool, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Full length, a word every token."""
    batch = full_length_inputs(rows, tokens, padded=padded)
    return {**batch, "labels": torch.zeros_like(batch["input_ids"])}


def _weightless_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_labels": len(check_labels(settings["labels"]))} if settings["labels"] else {}


KIND = TaskKind(
    name="token-classification",
    auto_class=AutoModelForTokenClassification,
    peft_type="TOKEN_CLS",
    make_encoder=_encoder,
    make_task=_task,
    weightless_batch=weightless_batch,
    weightless_settings=_weightless_settings,
    new_head=True,
    loss_unit="word",
)
