"""Does a model really keep packed examples apart? Ask the model.

Packing relies on every layer reading restarting positions as a boundary. Attention built by
transformers does; ALiBi models, state-space layers and remote code may not, and then packed
examples silently see each other. One forward pass over sixteen tokens tells: change the first
example, and nothing in the second may change.
"""

from typing import Any

import torch
from torch import nn

from qlora_trainer.base.packed_attention import example_lengths, takes_example_lengths
from qlora_trainer.errors import UserError

_TOKENS = 8


@torch.no_grad()
def packing_leak(model: nn.Module, device: torch.device, vocab_size: int) -> float:
    """How much the second of two packed examples changes with the first, relative to its size.

    Zero, or rounding of the compute dtype, for a model that keeps examples apart. The model is left
    in the mode it was in; no random state is touched.
    """
    ids = torch.arange(2 * _TOKENS, device=device)[None] % vocab_size  # (1, 2 * _TOKENS)
    other = ids.clone()
    other[:, :_TOKENS] = (other[:, :_TOKENS] * 7 + 3) % vocab_size
    positions = torch.arange(_TOKENS, device=device).repeat(2)[None]
    training = model.training
    model.eval()
    try:
        first, second = (_second_half(model, given, positions) for given in (ids, other))
    finally:
        model.train(training)
    return float((first - second).abs().max() / first.abs().max().clamp_min(1e-12))


def _second_half(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids, "position_ids": positions}
    if takes_example_lengths(model):
        inputs["attention_mask"] = example_lengths(positions.cpu())
    logits = model(**inputs, use_cache=False).logits
    half: torch.Tensor = logits[:, _TOKENS:].float()
    return half


def refuse_packing_leak(model: nn.Module, device: torch.device, vocab_size: int) -> None:
    """Refuse packing for a model that lets packed examples see each other.

    Raises:
        UserError: It does.
    """
    try:
        leak = packing_leak(model, device, vocab_size)
    except TypeError as error:
        raise UserError(
            f"data.packing = true: this model takes no position_ids ({error}), so packed examples "
            "would see each other; set data.packing: false"
        ) from error
    if not leak < 1e-2:
        raise UserError(
            f"data.packing = true: this model lets packed examples see each other (changing one "
            f"moves another's logits by {leak:.1%}); set data.packing: false"
        )
