"""How a transformers checkpoint is told to llama.cpp: names, metadata and layout, family by family.

The `gguf` package knows tensor names; what a family does beyond names stands here, once each:
Llama and Mistral store query and key rows in another order for rotary embedding, Gemma's norms
multiply by one plus their weight, Llama 3's stretched frequencies become a tensor of factors. A
model outside these families, or with a part llama.cpp would drop, is refused.
"""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from qlora_trainer.errors import UserError

CONVERTER = (
    "use llama.cpp's own converter on the merged folder: "
    "python convert_hf_to_gguf.py MERGED --outfile MODEL.gguf --outtype f16"
)

# What the writer says of a value it cannot store.
NOT_AS_EXPECTED = (
    AttributeError, KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What a family needs beyond names.

    Attributes:
        arch: llama.cpp's architecture.
        permuted: Query and key rows are stored in llama.cpp's rotary order.
        norm_plus_one: Norm weights are stored as one plus the weight.
        own_metadata: transformers' reader rebuilds the whole configuration from the file.
    """

    arch: str
    permuted: bool = False
    norm_plus_one: bool = False
    own_metadata: bool = True


FAMILIES = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", own_metadata=False),  # the reader does not ask for head sizes
    "gemma2": Family("gemma2", norm_plus_one=True, own_metadata=False),
    "gemma3_text": Family("gemma3", norm_plus_one=True, own_metadata=False),
}


def family_of(config: Any) -> Family:
    """The family of a model.

    Raises:
        UserError: Not covered; the message names the tool that may cover it.
    """
    kind = str(config.model_type)
    family = FAMILIES.get(kind)
    if family is None:
        raise UserError(
            f"--format gguf: {kind} models are not covered (covered: {', '.join(FAMILIES)}); "
            f"export --format merged and {CONVERTER}"
        )
    rope = rope_settings(config)
    if rope["rope_type"] not in ("default", "llama3", "linear"):
        raise UserError(
            f"--format gguf: rotary embedding of type {rope['rope_type']!r} is not covered; export "
            f"--format merged and {CONVERTER}"
        )
    return family


@contextmanager
def refused_by(folder: Path) -> Iterator[None]:
    """Within, a value of a configuration that cannot be told to llama.cpp is the user's to mend.

    Raises:
        UserError: There is one.
    """
    try:
        yield
    except NOT_AS_EXPECTED as error:
        raise UserError(
            f"--format gguf: {folder / 'config.json'} holds a value that a GGUF file cannot "
            f"({type(error).__name__}: {error}); mend it, or export --format merged and {CONVERTER}"
        ) from error


def rope_settings(config: Any) -> dict[str, Any]:
    """Rotary settings of full attention, `rope_type` and `rope_theta` always among them."""
    settings = dict(getattr(config, "rope_parameters", None) or {})
    settings = dict(settings.get("full_attention", settings))
    settings.setdefault("rope_type", "default")
    settings.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    return settings


def head_size(config: Any) -> int:
    """Width of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def add_metadata(writer: Any, config: Any, family: Family, name: str) -> None:
    """Write what llama.cpp needs to know of the architecture."""
    rope = rope_settings(config)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_vocab_size(config.vocab_size)
    if family.arch == "llama":
        writer.add_rope_dimension_count(head_size(config))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if family.arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
        if getattr(config, "attn_logit_softcapping", None):
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if getattr(config, "final_logit_softcapping", None):
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def tensor_name(names: Any, name: str) -> str:
    """llama.cpp's name for a tensor.

    Raises:
        UserError: It has none: something of the model would be lost.
    """
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(
            f"--format gguf: llama.cpp has no place for {name} in this architecture; export "
            f"--format merged and {CONVERTER}"
        )
    return str(found)


def stored_rows(name: str, values: Tensor, config: Any, family: Family) -> Tensor:
    """A tensor as llama.cpp wants it; still in the dtype it came in where nothing is computed."""
    if family.permuted and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        of_keys = ".k_proj." in name
        heads = config.num_key_value_heads if of_keys else config.num_attention_heads
        return rotary_order(values, heads)
    if family.norm_plus_one and name.endswith("norm.weight"):
        return values.float() + 1
    return values


def rotary_order(values: Tensor, heads: int) -> Tensor:
    """Rows of each head from two halves (transformers) to interleaved pairs (llama.cpp)."""
    shape = values.shape
    halves = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return halves.transpose(1, 2).reshape(shape)


def stretched_frequencies(config: Any) -> "np.ndarray[Any, Any] | None":
    """Llama 3's division of each rotary frequency, as llama.cpp's `rope_freqs`; None without.

    Wavelengths up to a quarter of the original context stay, those beyond the whole are divided
    by `factor`, those between change over smoothly (Llama 3.1 model card, `apply_scaling`).
    """
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return None
    size = head_size(config)
    frequencies = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, size, 2).double() / size)
    wavelengths = 2 * math.pi / frequencies
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    result: np.ndarray[Any, Any] = (1 / ((1 - smooth) / factor + smooth)).float().numpy()
    return result
