"""An attention of ours in the place of `sdpa`, through transformers' public registries.

Set on the model instance: nothing of the library is changed, and other models keep theirs.
"""

from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def replace_sdpa(
    model: Any, name: str, attend: Callable[..., Any], *, as_sdpa: bool = False
) -> bool:
    """Let a model whose attention is `sdpa` attend by a function of ours, with the same masks.

    Args:
        model: Of transformers; one whose layers take no function from outside stays as it is.
        name: What the function is registered as.
        attend: Takes what `sdpa_attention_forward` takes.
        as_sdpa: It calls `sdpa` in the end, so that any model may have it that asks the registry,
            not only those whose class declares that all their layers take any attention.

    Returns:
        Whether it does now.
    """
    if model.config._attn_implementation != "sdpa":
        return False
    declared = getattr(model, "_supports_attention_backend", False)
    asks_registry = getattr(model, "_can_set_attn_implementation", None)
    if not declared and not (as_sdpa and asks_registry is not None and asks_registry()):
        return False
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    return True
