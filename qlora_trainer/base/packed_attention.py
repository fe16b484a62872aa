"""Attention of packed examples one by one, with no mask over the whole row.

Examples packed into one row must not see each other. transformers says so with a mask of T x T
entries, which takes the fused causal kernels away and grows with the square of the row. Here the
row's queries, keys and values are cut at the examples' ends and every example runs through the
model's own attention as a causal sequence: memory grows with T, work with the sum of the squares.
Where a card has a kernel that takes the whole row with its ends, that one runs
(`base/variable_length.py`).

How the ends get there without a global: a 4-D `attention_mask` is handed through to every layer as
it is (transformers' masking code returns "already prepared" masks untouched), so the lengths travel
as a tensor (1, 1, 1, examples) of int32 *on the host*, which no real mask is; nobody has to ask the
device for them. Both registries used are transformers' public ones; the attention is set on the
model instance. Batches without packing pass through to the attention underneath, mask and all.

Given up: a window of attention shorter than an example needs that example's own mask, and can only
be made where the layer hands its window to the attention function. Models that keep a window or
chunks in transformers' mask alone (Phimoe, Doge, Llama 4) keep that mask.

    B = 1 rows, H heads, T tokens, D head size
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_trainer.base.expanded_attention import NAME as EXPANDED
from qlora_trainer.base.host_embedding import compute_device
from qlora_trainer.base.tiled_attention import NAME as TILED
from qlora_trainer.base.variable_length import attend_at_once, why_example_by_example

PREFIX = "packed_"
WRAPPED = ("sdpa", EXPANDED, TILED)


def example_lengths(position_ids: Tensor) -> Tensor:
    """Lengths of the examples of one row, in the form that travels as a mask.

    Args:
        position_ids: (1, T) on the host, restarting at 0 with each example.

    Returns:
        (1, 1, 1, examples) int32.

    >>> example_lengths(torch.tensor([[0, 1, 2, 0, 1]])).flatten().tolist()
    [3, 2]
    """
    starts = (position_ids[0] == 0).nonzero().squeeze(1)
    ends = torch.cat((starts[1:], starts.new_tensor([position_ids.shape[1]])))
    return (ends - starts).to(torch.int32)[None, None, None]


def is_example_lengths(tensor: Tensor) -> bool:
    """Whether a tensor is what `example_lengths` makes."""
    return tensor.dtype == torch.int32 and tensor.dim() == 4 and tensor.shape[:3] == (1, 1, 1)


def use_packed_attention(
    model: Any,
    longest: int | None = None,
    *,
    wrapped: Sequence[str] = WRAPPED,
    capability: tuple[int, int] | None = None,
) -> bool:
    """Let a model take packed rows without a mask, where its attention is one we can wrap.

    Args:
        model: On which it is set.
        longest: Most tokens of an example; a window no shorter than that hides nothing.
        wrapped: Registered attentions that can be called example by example.
        capability: Of the card that a weightless model stands for; a real card is asked.

    Returns:
        Whether it does now.
    """
    inner = model.config._attn_implementation
    if takes_example_lengths(model):
        return True
    if inner not in wrapped or why_masked(model, longest) is not None:
        return False
    name = f"{PREFIX}{inner}"
    AttentionInterface.register(name, functools.partial(_attend, capability=capability))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    model.set_attn_implementation(name)
    return takes_example_lengths(model)


def why_masked(model: Any, longest: int | None = None) -> str | None:
    """Why a model needs the mask of the whole row; None where `_attend` can do without.

    None as well where its attention takes no such mask: flash attention reads the positions.

    Args:
        model: Any transformers model of text.
        longest: Most tokens of an example.
    """
    inner = model.config._attn_implementation
    if inner == "flash_attention_2":
        return None
    if inner == "eager":
        return "its attention is eager, which masks the scores it builds"
    # The class says whether all its layers hand masks through to transformers' registry.
    if not getattr(model, "_supports_attention_backend", False):
        return "its layers take no attention from outside"
    config = model.config.get_text_config()
    if getattr(config, "attention_chunk_size", None) is not None:
        return "its attention goes in chunks, which only the mask knows"
    window = getattr(config, "sliding_window", None)
    if window is None or (longest is not None and longest <= window):
        return None
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and _attends(type(m))]
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    for layer in layers:
        expected = window if kinds[layer.layer_idx] == "sliding_attention" else None
        if not _hands_on_window(layer) or getattr(layer, "sliding_window", expected) != expected:
            break
    else:
        if layers:
            return None
    return f"its window of {window} tokens is in the mask alone"


def _attends(kind: type) -> bool:
    return kind.__name__.endswith("Attention")


def _hands_on_window(layer: Any) -> bool:
    """Whether a layer's own code names its window to the attention function.

    Only its source says so before it runs; without the source the answer is the careful one.
    """
    try:
        return "sliding_window=" in inspect.getsource(inspect.unwrap(type(layer).forward))
    except (OSError, TypeError):
        return False


def takes_example_lengths(model: Any) -> bool:
    """Whether `use_packed_attention` has been put on the model."""
    name = getattr(model.config, "_attn_implementation", None)
    return isinstance(name, str) and name.startswith(PREFIX)


def _attend(
    module: Any,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    capability: tuple[int, int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    inner = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation.removeprefix(PREFIX)]
    if attention_mask is None or not is_example_lengths(attention_mask):
        attended, _ = inner(module, query, key, value, attention_mask, **kwargs)
        return attended, None
    window = kwargs.get("sliding_window")
    if _why_example_by_example(module, query, value, capability, kwargs) is None:
        row, scale = attention_mask.flatten(), kwargs.get("scaling")
        return attend_at_once(query, key, value, row, window=window, scale=scale), None
    lengths = attention_mask.flatten().tolist()
    outputs = []
    # `split`, not slices: its gradient is one concatenation, a slice's is a row full of zeros
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    for (q, k, v), length in zip(parts, lengths, strict=True):
        mask = None if window is None or length <= window else _window_mask(length, window, q)
        attended, _ = inner(module, q, k, v, mask, **kwargs)
        outputs.append(attended)  # (B, length, H, D)
    return torch.cat(outputs, dim=1), None


def _why_example_by_example(
    module: Any,
    query: Tensor,
    value: Tensor,
    capability: tuple[int, int] | None,
    kwargs: Mapping[str, Any],
) -> str | None:
    if query.device.type == "cuda":
        capability = torch.cuda.get_device_capability(query.device)
    causal = kwargs.get("is_causal")
    return why_example_by_example(
        capability,
        query.dtype,
        query.shape[-1],
        value.shape[-1],
        causal=getattr(module, "is_causal", True) if causal is None else bool(causal),
        dropout=kwargs.get("dropout") or 0.0,
    )


def how_packed(model: Any) -> str | None:
    """In words, how packed examples attend on the model's card; None where it is on none."""
    device = compute_device(model)
    if device.type != "cuda" or not takes_example_lengths(model):
        return None
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    capability = torch.cuda.get_device_capability(device)
    why = why_example_by_example(
        capability, model.dtype, size, dropout=getattr(config, "attention_dropout", 0.0) or 0.0
    )
    if why is None:
        return "packed examples attend in one call, told where each ends"
    return f"packed examples attend one by one: {why}"


def _window_mask(length: int, window: int, query: Tensor) -> Tensor:
    """Causal, and at most `window` tokens back: (1, 1, length, length), True where visible."""
    place = torch.arange(length, device=query.device)
    back = place[:, None] - place[None]
    return ((back >= 0) & (back < window))[None, None]
