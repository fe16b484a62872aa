"""Which layers of a model are held in 4 bits, and for every other one the reason why not.

Quantized are plain linear layers (and GPT-2's `Conv1D`) inside the transformer. Heads, embeddings
and routers stay in 16 bit: they are few bytes where precision counts, a new head has to be
trained, and a quantized head is what broke classifiers elsewhere.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_trainer.errors import UserError

# Heads of models whose class has no separate base model to tell them by.
_HEAD_NAMES = {
    "lm_head", "score", "classifier", "qa_outputs", "embed_out", "proj_out", "classification_head",
}  # fmt: skip
_POOLER = "pooler"
_ROUTER_NAMES = {"gate", "router"}
_ROUTER_REASON = "router: which expert runs hangs on its precision"
# Subclasses of nn.Linear that compute the same product, only differently rounded.
_PLAIN_SUBCLASSES = {"FalconLinear"}


@dataclass(frozen=True)
class Selection:
    """Paths of the layers to quantize, and path -> reason for those that stay as they are."""

    quantized: tuple[str, ...]
    kept: dict[str, str]


def select_quantized(model: nn.Module, keep_unquantized: Iterable[str] = ()) -> Selection:
    """Decide for every layer with a weight matrix.

    Args:
        model: A transformers model, with weights or weightless.
        keep_unquantized: Paths, or ends or inner parts of paths (`q_proj`, `layers.0.mlp`), that
            shall stay in 16 bit as well.

    Raises:
        UserError: A name in `keep_unquantized` fits no layer.
    """
    keep = tuple(keep_unquantized)
    heads = head_paths(model)
    shared = _shared_parameters(model)
    strict = _kept_in_fp32(model)
    quantized: list[str] = []
    kept: dict[str, str] = {}
    unmatched = set(keep)
    for path, module in model.named_modules():
        if not any(True for p in module.parameters(recurse=False) if p.dim() > 1):
            continue
        chosen = [name for name in keep if path_matches(path, name)]
        unmatched.difference_update(chosen)
        reason = (
            _reason_by_kind(module)
            or _reason_by_place(path, module, heads, shared)
            or ("the model class keeps it in fp32" if strict(path) else None)
            or (f"kept by model.keep_unquantized ({chosen[0]})" if chosen else None)
        )
        if reason is None:
            quantized.append(path)
        else:
            kept[path] = reason
    if unmatched:
        raise UserError.from_faults(
            "model.keep_unquantized",
            [f"{name!r} fits no layer of {type(model).__name__}" for name in sorted(unmatched)],
        )
    return Selection(tuple(quantized), kept)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a plain product: `nn.Linear` or `Conv1D`, no subclass with ideas of its own."""
    kind = type(module)
    return kind is nn.Linear or kind is Conv1D or kind.__name__ in _PLAIN_SUBCLASSES


def is_router(module: nn.Module) -> bool:
    """Whether it chooses experts, by the name transformers gives such classes."""
    return type(module).__name__.lower().endswith("router")


def path_matches(path: str, name: str) -> bool:
    """Whether whole components of a module path spell `name`.

    >>> path_matches("model.layers.1.mlp.up_proj", "up_proj")
    True
    >>> path_matches("model.layers.11.mlp", "layers.1")
    False
    """
    return f".{name}." in f".{path}."


def head_paths(model: nn.Module) -> set[str]:
    """Paths of every module that stands on top of the transformer, its output embedding included.

    They are what lies outside the model class's own base model; where the class has none, what
    transformers names as output embedding and the usual names of heads.
    """
    output = _output_embedding(model)
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    base = getattr(model, prefix, None) if prefix else None
    heads: set[str] = set()
    for path, module in model.named_modules():
        outside = isinstance(base, nn.Module) and not f"{path}.".startswith(f"{prefix}.")
        if path and (outside or module is output or path.rsplit(".", 1)[-1] in _HEAD_NAMES):
            heads.add(path)
    return heads


def trained_heads(model: nn.Module) -> list[str]:
    """The head of a task, to be trained in full: outermost modules on top, and the pooler below.

    A pooler (BERT's dense layer over the first token) belongs to the head: a checkpoint of a
    language model has none, and nothing but the head reads it.
    """
    heads = head_paths(model)
    found: list[str] = []
    for path, module in model.named_modules():
        is_head = path in heads or path.rsplit(".", 1)[-1] == _POOLER
        has_weights = any(True for _ in module.parameters())
        if is_head and has_weights and not path.startswith(tuple(f"{p}." for p in found)):
            found.append(path)
    return found


def stays_fp32(model: nn.Module, fp16: bool) -> "re.Pattern[str] | None":
    """What of the model must be fp32 whatever is computed in: transformers' own list for it.

    Args:
        model: A transformers model.
        fp16: Computed in fp16, where some classes list more.
    """
    names = set(cast(Any, getattr(model, "_keep_in_fp32_modules_strict", None)) or ())
    if fp16:
        names |= set(cast(Any, getattr(model, "_keep_in_fp32_modules", None)) or ())
    if not names:
        return None
    spelled = "|".join(re.escape(name).replace(r"\*", r"\w*") for name in sorted(names))
    return re.compile(rf"(?:^|\.)(?:{spelled})(?:\.|$)")


def _kept_in_fp32(model: nn.Module) -> Any:
    pattern = stays_fp32(model, fp16=False)
    return (lambda _path: False) if pattern is None else pattern.search


def _reason_by_kind(module: nn.Module) -> str | None:
    kind = type(module).__name__
    if is_linear(module):
        return None
    if is_router(module):
        return _ROUTER_REASON
    if isinstance(module, nn.Embedding):
        return "embedding: a look-up, not a product"
    if isinstance(module, nn.Linear):
        return f"{kind} is not a plain linear layer"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "convolution: NF4 kernels only multiply matrices"
    if any(p.dim() == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False)):
        return f"{kind} holds all experts fused in 3-D weights, which NF4 layers do not cover"
    return f"{kind} is not a linear layer"


def _reason_by_place(path: str, module: nn.Module, heads: set[str], shared: set[int]) -> str | None:
    weight = cast(nn.Parameter, module.weight)
    if path in heads:
        return "head: stays in the compute dtype"
    if _POOLER in path.split("."):
        return "pooler: a part of the head"
    if id(weight) in shared:
        return "its weight is shared with another layer"
    if path.rsplit(".", 1)[-1] in _ROUTER_NAMES:
        return _ROUTER_REASON
    if min(weight.shape) == 1:
        return "a gate: its weight is a single row"
    return None


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return cast("nn.Module | None", getter()) if callable(getter) else None


def _shared_parameters(model: nn.Module) -> set[int]:
    """Identities of parameters registered in more than one module."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
