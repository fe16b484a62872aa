"""What a user should know of a model's attention: what of it grows with the square of a row."""

from collections.abc import Iterator
from typing import Any

from qlora_trainer.base.packed_attention import how_packed, takes_example_lengths, why_masked


def attention_notes(
    model: Any, *, packed: bool = False, mask_free: bool = True, longest: int | None = None
) -> Iterator[str]:
    """Say of scores and masks that are built whole; of packed rows on a card, how they attend.

    Args:
        model: Of transformers, its attention set.
        packed: As `data.packing`.
        mask_free: As `data.mask_free_packing`.
        longest: Most tokens of an example.
    """
    name = type(model).__name__
    if model.config._attn_implementation == "eager":
        yield (
            f"model.attention: {name} attends eagerly and builds all scores of every layer, whose "
            f"memory grows with the square of a row's length{_without_scores(model)}"
        )
    if not (packed and mask_free):
        return
    said = how_packed(model)
    if said is not None:
        yield said
    reason = None if takes_example_lengths(model) else why_masked(model, longest)
    if reason is not None:
        yield (
            f"data.mask_free_packing: {name} keeps the mask of the whole packed row, because "
            f"{reason}; its memory grows with the square of data.max_seq_len"
        )


def _without_scores(model: Any) -> str:
    if getattr(model, "_supports_sdpa", False):
        return "; 'auto' builds none"
    if getattr(model, "_supports_flash_attn", False):
        return "; transformers has no sdpa for it; 'flash_attention_2' on a GPU builds none"
    return "; transformers has no other for it"
