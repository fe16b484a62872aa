"""One label for a picture, by vision transformers and convolutional networks.

The head is trained in full and saved; cross-entropy is made in fp32. Adapters go on linear layers,
or on convolutions where they are named (`adapter.target_modules: [convolution]` for a ResNet).
Batch norms keep the statistics of the base (`base/batch_norm.py`): the base is frozen.

B rows, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from qlora_trainer.data.encode_pictures import PictureEncoder
from qlora_trainer.data.labels import label_settings
from qlora_trainer.data.picture_records import find_labels
from qlora_trainer.errors import UserError
from qlora_trainer.tasks.class_metrics import confusion_matrix
from qlora_trainer.tasks.confusion import score_matrix
from qlora_trainer.tasks.kind import EncoderInputs, TaskInputs, TaskKind
from qlora_trainer.tasks.labels import (
    balanced_weights,
    count_labels,
    head_labels,
    known_names,
)
from qlora_trainer.tasks.task import Batch, Scores

_TOP = 5
_AVERAGES = ("macro_precision", "macro_recall", "macro_f1", "micro_f1", "weighted_f1", "matthews")
_USUAL_SIDE = 224  # pixels, where neither run file nor model say


@dataclass(frozen=True, eq=False)
class ImageClassification:
    """The image classification task of one model.

    Attributes:
        dtype: Pixels are given in; the base computes in it.
        label_names: In the order of the head's outputs.
        class_weights: (C,) What a row of each class counts in the loss, on average 1.
    """

    dtype: torch.dtype
    label_names: tuple[str, ...]
    class_weights: Tensor | None = None

    @property
    def metrics(self) -> Mapping[str, bool]:
        """The loss falls, everything else rises."""
        return {"loss": False, **dict.fromkeys(("accuracy", "top5_accuracy", *_AVERAGES), True)}

    @property
    def best_metric(self) -> str:
        """Accuracy."""
        return "accuracy"

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Pixels in the compute dtype; labels where there are some."""
        prepared = {"pixel_values": batch["pixel_values"].to(self.dtype)}
        if "labels" in batch:
            prepared["labels"] = batch["labels"]
        return prepared

    def loss_weight(self, batch: Batch) -> int:
        """Pictures."""
        return batch["pixel_values"].shape[0]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy summed over pictures."""
        return self._loss(_logits(model, batch), batch["labels"])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss and right pictures, summed."""
        return self._sums(_logits(model, batch), batch["labels"])

    @torch.no_grad()
    def evaluate_rows(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], list[Any]]:
        """Sums, and the likeliest labels of each picture, by one pass."""
        logits = _logits(model, batch)
        return self._sums(logits, batch["labels"]), self._predictions(logits)

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """The likeliest labels of each picture."""
        return self._predictions(_logits(model, batch))

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
        """Figures of classes, their table, the confusion matrix."""
        ids = {name: number for number, name in enumerate(self.label_names)}
        matrix = confusion_matrix(
            np.array([ids[name] for name in references]),
            np.array([ids[made["label"]] for made in predictions]),
            len(ids),
        )
        return score_matrix(matrix, self.label_names)

    def tell(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[dict[str, Any]]:
        """One label with its probability per picture, and the next likely ones."""
        return [dict(made) for made in predictions]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = self.class_weights
        if weights is not None:
            weights = weights.to(logits)
        return nn.functional.cross_entropy(logits, labels, weight=weights, reduction="sum")

    def _sums(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        top = logits.topk(min(_TOP, logits.shape[1]), dim=1).indices  # (B, 5)
        right = top == labels[:, None]
        return {
            "loss": self._loss(logits, labels),
            "accuracy": right[:, 0].sum(),
            "top5_accuracy": right.any(1).sum(),
        }

    def _predictions(self, logits: Tensor) -> list[Any]:
        shares, classes = logits.softmax(1).topk(min(_TOP, logits.shape[1]), dim=1)
        return [
            {
                "label": self.label_names[ids[0]],
                "score": values[0],
                "top": [[self.label_names[i], value] for i, value in zip(ids, values, strict=True)],
            }
            for values, ids in zip(shares.tolist(), classes.tolist(), strict=True)
        ]


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """(B, C) At least fp32."""
    net: Any = model
    logits: Tensor = net(pixel_values=batch["pixel_values"]).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _encoder(inputs: EncoderInputs) -> PictureEncoder:
    channels = getattr(inputs.config, "num_channels", 3)
    if channels != 3:
        raise UserError(
            f"the model takes pictures of {channels} channels; only red, green and blue are read: "
            "take a model with num_channels = 3"
        )
    settings = inputs.settings
    names = settings["labels"]
    if names is None:
        names = known_names(inputs.config, find_labels(inputs.training_rows()))
    if len(names) < 2:
        raise UserError(f"task_settings.labels = {names}: at least two are needed")
    return PictureEncoder(
        inputs.processor,
        names,
        augment=settings["augment"] == "light",
        side=settings["image_size"],
        labelled=inputs.labelled,
    )


def _task(inputs: TaskInputs) -> ImageClassification:
    names = head_labels(inputs.model.config)
    weights = None
    if inputs.settings["class_weights"] == "balanced" and inputs.train is not None:
        weights = balanced_weights(count_labels(inputs.train, "label", len(names)))
    return ImageClassification(_compute_dtype(inputs.model), names, weights)


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """Of the frozen base; adapters and the head may be held in fp32 beside it."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    frozen = [p for p in floating if not p.requires_grad]
    return (frozen or floating)[0].dtype


def weightless_batch(
    config: Any, *, rows: int, tokens: int, padded: bool, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Pictures of the size the run file or the processor names, else the configuration."""
    size = settings["image_size"] or getattr(config, "image_size", None) or _USUAL_SIDE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {
        "pixel_values": torch.zeros((rows, 3, height, width)),
        "labels": torch.zeros(rows, dtype=torch.int64),
    }


def _weightless_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return label_settings(settings["labels"]) if settings["labels"] else {}


KIND = TaskKind(
    name="image-classification",
    auto_class=transformers.AutoModelForImageClassification,
    peft_type=None,
    make_encoder=_encoder,
    make_task=_task,
    weightless_batch=weightless_batch,
    weightless_settings=_weightless_settings,
    new_head=True,
    reads="image",
    loss_unit="picture",
)
