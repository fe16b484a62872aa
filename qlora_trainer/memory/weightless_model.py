"""The model that is foreseen: without weights, with the attention it would have on a card."""

from typing import Any

from qlora_trainer.base.attention_notes import attention_notes
from qlora_trainer.base.load import build_weightless_base
from qlora_trainer.base.packed_attention import use_packed_attention
from qlora_trainer.base.tiled_attention import chooses_tiles
from qlora_trainer.memory.attention import attention_for
from qlora_trainer.memory.gpus import Gpu
from qlora_trainer.memory.program import RunShape
from qlora_trainer.tasks.catalogue import task_kind


def weightless_model(config: Any, shape: RunShape, card: Gpu | None, model_class: Any) -> Any:
    """Build it; packed rows go without a mask where those of the run do.

    Args:
        config: The model's transformers configuration.
        shape: The run's settings.
        card: Whose attention it has; None for a CPU's.
        model_class: In place of the task's auto class, unless None.

    Raises:
        UserError: The model cannot have these settings.
    """
    model = build_weightless_base(
        config, model_class or task_kind(shape.task).auto_class, shape.base
    )
    if model.config._attn_implementation != "sdpa":
        return model
    tiles = card is None and chooses_tiles(shape.base.attention, shape.base.compute_dtype)
    name = attention_for(card, in_tiles=tiles)
    model.set_attn_implementation(name)
    if shape.packed and shape.mask_free:
        capability = None if card is None else card.compute_capability
        use_packed_attention(model, shape.seq_len, wrapped=(name,), capability=capability)
    return model


def notes_of(model: Any, shape: RunShape) -> tuple[str, ...]:
    """What the user should know of its attention."""
    return tuple(
        attention_notes(
            model, packed=shape.packed, mask_free=shape.mask_free, longest=shape.seq_len
        )
    )
