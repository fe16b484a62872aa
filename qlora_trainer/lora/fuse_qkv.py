"""Letting the self-attention of a model instance compute q, k and v together and rotate in one go.

The module stays what it is, with its projections under their names and all that an attention
function asks of it (`is_causal`, `scaling`, its window); only the forward of this instance is ours,
as `training/activations.py` does it for a layer. Layouts that were read and are tested are taken,
by the name of the transformers class; others keep their own forward, and the caller is told.
Without gradients, or with a cache of keys, the module's own forward runs.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_trainer.base.rotary import rotate
from qlora_trainer.lora.fuse import Replaced, why_not_layout, why_not_projections
from qlora_trainer.lora.projections import Projection, project_together

_NAMES = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Layout:
    """How one class attends.

    Attributes:
        norms_heads: Norms queries and keys head by head before they turn.
        window: Where its sliding window is kept: a dotted name from the module; None has none.
    """

    norms_heads: bool = False
    window: str | None = None


LAYOUTS: dict[str, Layout] = {
    "LlamaAttention": Layout(),
    "MistralAttention": Layout(window="config.sliding_window"),
    "Qwen2Attention": Layout(window="sliding_window"),
    "Qwen3Attention": Layout(norms_heads=True, window="sliding_window"),
}


def fuse_qkv(model: nn.Module) -> Replaced:
    """Give every self-attention we know the fused forward; calling it again changes nothing.

    Args:
        model: Of transformers, adapters already on it.
    """
    fused: list[str] = []
    kept: dict[str, str] = {}
    for path, module in model.named_modules():
        if not type(module).__name__.endswith("Attention"):
            continue
        reason = why_not_layout(module, LAYOUTS) or why_not_projections(module, _NAMES)
        if reason is not None:
            kept[path] = reason
            continue
        module.forward = MethodType(_attend, module)  # on this instance
        fused.append(path)
    return Replaced(tuple(fused), kept)


def _attend(
    self: Any,
    hidden_states: Tensor,  # (B, T, D)
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' forward of these classes, q, k and v computed together."""
    plain = not self.training and not torch.is_grad_enabled()
    if plain or past_key_values is not None or position_embeddings is None:
        result: tuple[Tensor, Tensor | None] = type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
        return result
    layout = LAYOUTS[type(self).__name__]
    projections = [Projection.of(getattr(self, name)) for name in _NAMES]
    # A 4-bit base says what it computes in, as in `LowRankLayer`.
    dtype = getattr(projections[0].base, "compute_dtype", hidden_states.dtype)
    computed = hidden_states.to(dtype)
    query, key, value = (
        part.to(hidden_states.dtype).unflatten(-1, (-1, self.head_dim))  # (B, T, H, head)
        for part in project_together(computed, projections)
    )
    if layout.norms_heads:
        query, key = self.q_norm(query), self.k_norm(key)
    query, key = (rotate(heads, *position_embeddings) for heads in (query, key))
    windows = {} if layout.window is None else {"sliding_window": _read(self, layout.window)}
    out, weights = _attention_of(self)(
        self,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        **windows,
        **kwargs,
    )
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def _attention_of(module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function the model attends by; `eager` is defined beside each class."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    chosen: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager
    )
    return chosen


def _read(module: Any, dotted: str) -> Any:
    """An attribute by its dotted name."""
    for name in dotted.split("."):
        module = getattr(module, name, None)
    return module
