"""What a task is made of: one record each, gathered in `catalogue`.

A kind knows how records become batches (its encoder), what a batch is worth (its `Task`), which
class of transformers it takes, and what its largest batch looks like where there is no data. All
values are plain; the run file is read above.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.data.rows import RecordEncoder
from qlora_trainer.tasks.linear_cross_entropy import PLAIN, Regularized
from qlora_trainer.tasks.task import Task


@dataclass(frozen=True)
class EncoderInputs:
    """What an encoder is made of.

    Attributes:
        tokenizer: The model's; None for tasks that read images.
        processor: The model's image processor, for tasks that read images.
        config: transformers' configuration of the base.
        max_seq_len: Most tokens of an example.
        over_length: `raise`, `truncate` or `drop`.
        settings: The run file's `task_settings`, every one of them.
        training_rows: Begins a pass over the training records, under our field names, for what
            only all of them tell (which labels there are). Records may be faulty: that is told
            when they are encoded.
        labelled: False where predictions are asked for: records need not say the answer.
        chat_template: As in the run file.
        chat_template_kwargs: As in the run file.
        loss_on: As in the run file.
    """

    tokenizer: Any
    processor: Any
    config: Any
    max_seq_len: int
    over_length: str
    settings: Mapping[str, Any]
    training_rows: Callable[[], Iterator[Mapping[str, Any]]]
    labelled: bool = True
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss_on: str = "assistant"


@dataclass(frozen=True)
class TaskInputs:
    """What a `Task` is made of.

    Attributes:
        model: With its adapter; may be on `meta`.
        settings: The run file's `task_settings`.
        encoder: What made the data; None where memory is foreseen.
        train: The training examples; None where memory is foreseen or nothing is trained.
        chunk_tokens: As in the run file.
        regularized: Label smoothing and z-loss of the tasks that know them.
        chunked_loss: As in the run file.
        on_cpu: Whether a CPU will compute it; None: as the model lies.
    """

    model: nn.Module
    settings: Mapping[str, Any]
    encoder: RecordEncoder | None = None
    train: EncodedDataset | None = None
    chunk_tokens: int | None = None
    regularized: Regularized = PLAIN
    chunked_loss: bool = True
    on_cpu: bool | None = None


class WeightlessBatch(Protocol):
    """Makes the largest batch of a run without data: what is foreseen."""

    def __call__(
        self, config: Any, *, rows: int, tokens: int, padded: bool, settings: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Collate a host batch, not yet prepared.

        Args:
            config: The model's configuration.
            rows: Rows of the batch.
            tokens: `data.max_seq_len`.
            padded: Whether there is a mask.
            settings: The run file's `task_settings`.
        """
        ...


def full_length_inputs(
    rows: int, tokens: int, *, padded: bool, typed: bool = False, token: int = 0
) -> dict[str, Tensor]:
    """What a weightless batch of texts has whatever the task.

    Args:
        rows: Rows of the batch.
        tokens: Tokens of every row.
        padded: Whether there is a mask; the last token of the first row is then padding.
        typed: Whether there are token types.
        token: The id that stands everywhere.

    Returns:
        `input_ids` and what else is there of `attention_mask`, `token_type_ids`, (B, T) int64.
    """
    batch = {"input_ids": torch.full((rows, tokens), token, dtype=torch.int64)}
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -1] = 0
    if typed:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return batch


def no_changes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task that changes nothing in the model's configuration."""
    return {}


@dataclass(frozen=True)
class TaskKind:
    """One task.

    Attributes:
        name: As in the run file.
        auto_class: transformers' auto class of its models.
        peft_type: PEFT's name of the task; None where it has none.
        make_encoder: Records to examples.
        make_task: Loss and metrics.
        weightless_batch: The largest batch.
        weightless_settings: What the settings alone say of the model's configuration.
        new_head: The model has a head of its own for this task: made where the checkpoint has
            none, always trained and saved, never quantized.
        packing: Examples may share a row.
        reads: What records hold: decides between tokenizer and image processor.
        loss_unit: What the loss is a mean over.
    """

    name: str
    auto_class: Any
    peft_type: str | None
    make_encoder: Callable[[EncoderInputs], RecordEncoder]
    make_task: Callable[[TaskInputs], Task]
    weightless_batch: WeightlessBatch
    weightless_settings: Callable[[Mapping[str, Any]], dict[str, Any]] = no_changes
    new_head: bool = False
    packing: bool = False
    reads: Literal["text", "image"] = "text"
    loss_unit: str = "trained token"
