"""What a text is: one label, any number of labels, or a number, by a trained head.

An encoder's head reads its first token, a decoder's the last that is not padding; both as their
transformers class does it. Losses are cross-entropy, the mean over labels of binary cross-entropy,
and the squared error; each is summed over rows. Balanced class weights are scaled so that their
mean over the training rows is 1 (see `labels.balanced_weights`), which leaves the size of the loss
as it is.

B rows, T tokens, K labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.data.encode_texts import PROBLEM_TYPES, LabelledTextsEncoder
from qlora_trainer.data.labelled_texts import Problem, find_problem
from qlora_trainer.errors import UserError
from qlora_trainer.tasks.class_metrics import (
    class_report,
    confusion_matrix,
    counts_of_sets,
    pearson,
    spearman,
)
from qlora_trainer.tasks.confusion import score_matrix
from qlora_trainer.tasks.kind import EncoderInputs, TaskInputs, TaskKind, full_length_inputs
from qlora_trainer.tasks.labels import (
    balanced_weights,
    count_labels,
    head_labels,
    known_names,
)
from qlora_trainer.tasks.task import Batch, Scores, needed_mask

_AVERAGES = ("macro_precision", "macro_recall", "macro_f1", "micro_f1", "weighted_f1")
_METRICS: dict[Problem, dict[str, bool]] = {
    "single": dict.fromkeys(("accuracy", *_AVERAGES, "matthews"), True),
    "multi": dict.fromkeys(("accuracy", *_AVERAGES), True),
    "regression": {"pearson": True, "spearman": True, "mean_absolute_error": False},
}
_BEST: dict[Problem, str] = {"single": "accuracy", "multi": "micro_f1", "regression": "pearson"}
_PROBLEMS = {kind: problem for problem, kind in PROBLEM_TYPES.items()}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class SequenceClassification:
    """The classification task of one model.

    Attributes:
        problem: What labels are.
        labels: Their names in the order of the head's outputs.
        class_weights: (K,) What a row of each class counts in the loss; None: all the same.
    """

    problem: Problem
    labels: tuple[str, ...]
    class_weights: Tensor | None = None

    @property
    def metrics(self) -> Mapping[str, bool]:
        """The loss falls, most others rise."""
        return {"loss": False, **_METRICS[self.problem]}

    @property
    def best_metric(self) -> str:
        """Accuracy; micro F1 of several labels; Pearson's correlation of a regression."""
        return _BEST[self.problem]

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Drop a mask that says nothing, and the row numbers."""
        others = {name: batch[name] for name in ("token_type_ids", "targets") if name in batch}
        return {"input_ids": batch["input_ids"], **needed_mask(batch), **others}

    def loss_weight(self, batch: Batch) -> int:
        """Rows."""
        return batch["input_ids"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss summed over rows."""
        return self._loss(self._logits(model, batch), batch["targets"])

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(**{name: batch[name] for name in _INPUTS if name in batch}).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, K)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.problem == "regression":
            return nn.functional.mse_loss(logits[:, 0], targets.to(logits), reduction="sum")
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        if self.problem == "single":
            return nn.functional.cross_entropy(logits, targets, weight=weights, reduction="sum")
        every = nn.functional.binary_cross_entropy_with_logits(
            logits, targets.to(logits), weight=weights, reduction="none"
        )
        return every.mean(1).sum()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss, summed."""
        return {"loss": self._loss(self._logits(model, batch), batch["targets"])}

    @torch.no_grad()
    def evaluate_rows(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], list[Any]]:
        """The loss, and what `predict` gives, in one pass."""
        logits = self._logits(model, batch)
        return {"loss": self._loss(logits, batch["targets"])}, self._rows(logits)

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """Per row the probability of every label, or [the number]."""
        return self._rows(self._logits(model, batch))

    def _rows(self, logits: Tensor) -> list[list[float]]:
        if self.problem == "single":
            logits = logits.softmax(1)
        elif self.problem == "multi":
            logits = logits.sigmoid()
        rows: list[list[float]] = logits.tolist()
        return rows

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
        """Figures, the report by class and the confusion matrix."""
        found = np.asarray(predictions, np.float64)  # (N, K)
        if self.problem == "regression":
            return _regression_scores(found[:, 0], np.asarray(references, np.float64))
        if self.problem == "multi":
            truth = np.zeros(found.shape, bool)
            for number, places in enumerate(references):
                truth[number, places] = True
            counts = counts_of_sets(truth, found > 0.5)
            accuracy = float(((found > 0.5) == truth).all(1).mean())
            report = class_report(self.labels, counts)
            return Scores({"accuracy": accuracy, **counts.averages()}, report)
        classes = np.asarray(references, np.int64)
        matrix = confusion_matrix(classes, found.argmax(1), len(self.labels))
        scores = score_matrix(matrix, self.labels)
        accuracy = float(np.trace(matrix) / matrix.sum())
        return replace(scores, metrics={"accuracy": accuracy, **scores.metrics})

    def tell(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[dict[str, Any]]:
        """The label with its probability, all labels above one half, or the number."""
        told: list[dict[str, Any]] = []
        for row in predictions:
            if self.problem == "regression":
                told.append({"value": row[0]})
                continue
            shares = dict(zip(self.labels, row, strict=True))
            if self.problem == "multi":
                chosen = [name for name, share in shares.items() if share > 0.5]
                told.append({"labels": chosen, "probabilities": shares})
                continue
            best = max(shares, key=shares.__getitem__)
            told.append({"label": best, "score": shares[best], "probabilities": shares})
        return told


def _regression_scores(found: Any, truth: Any) -> Scores:
    metrics = {
        "pearson": pearson(found, truth),
        "spearman": spearman(found, truth),
        "mean_absolute_error": float(np.abs(found - truth).mean()),
    }
    return Scores(metrics, "\n".join(f"{name:<20} {value:.4f}" for name, value in metrics.items()))


def _label_counts(train: EncodedDataset, problem: Problem, labels: int) -> Any:
    """(K,) How many rows have each label."""
    if problem == "single":
        return count_labels(train, "label", labels)
    return sum((train.column(index, "label") for index in range(len(train))), np.zeros(labels))


def _encoder(inputs: EncoderInputs) -> LabelledTextsEncoder:
    settings = inputs.settings
    problem, labels = settings["problem"], settings["labels"]
    if problem == "regression" and labels is not None:
        raise UserError(
            "task_settings.labels: a regression has none; leave them out, or take another "
            "task_settings.problem"
        )
    if problem == "auto" or (labels is None and problem != "regression"):
        found, names = find_problem(inputs.training_rows())
        problem = found if problem == "auto" else problem
        labels = known_names(inputs.config, names) if labels is None else labels
    return LabelledTextsEncoder(
        inputs.tokenizer,
        problem=problem,
        labels=[] if problem == "regression" else labels,
        max_seq_len=inputs.max_seq_len,
        over_length=inputs.over_length,
        labelled=inputs.labelled,
    )


def _task(inputs: TaskInputs) -> SequenceClassification:
    model: Any = inputs.model
    problem = _PROBLEMS[model.config.problem_type or PROBLEM_TYPES["single"]]
    labels = head_labels(model.config)
    weights = None
    balanced = inputs.settings.get("class_weights") == "balanced" and problem != "regression"
    if balanced and inputs.train is not None:
        weights = balanced_weights(_label_counts(inputs.train, problem, len(labels)))
    return SequenceClassification(problem, labels, weights)


def weightless_batch(
    config: Any, *, rows: int, tokens: int, padded: bool, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Full length, one label a row."""
    typed = bool(getattr(config, "type_vocab_size", 0))
    batch = full_length_inputs(rows, tokens, padded=padded, typed=typed, token=1)
    many = settings.get("problem") == "multi"
    shape = (rows, config.num_labels) if many else (rows,)
    kind = torch.int64 if settings.get("problem") in (None, "auto", "single") else torch.float32
    batch["targets"] = torch.zeros(shape, dtype=kind)
    return batch


def _weightless_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    problem = settings.get("problem", "auto")
    changes: dict[str, Any] = {
        "problem_type": PROBLEM_TYPES.get(problem, PROBLEM_TYPES["single"]),
        "pad_token_id": 0,
    }
    labels = settings.get("labels")
    if problem == "regression":
        changes["num_labels"] = 1
    elif labels is not None:
        changes["num_labels"] = len(labels)
    return changes


KIND = TaskKind(
    name="sequence-classification",
    auto_class=AutoModelForSequenceClassification,
    peft_type="SEQ_CLS",
    make_encoder=_encoder,
    make_task=_task,
    weightless_batch=weightless_batch,
    weightless_settings=_weightless_settings,
    new_head=True,
    loss_unit="row",
)
