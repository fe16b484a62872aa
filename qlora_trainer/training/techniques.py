"""Techniques of the step that replace modules of the model instance, each by its own setting.

What each does is said where it lives (`lora/gated_mlp.py`, `base/norm.py`); here they are put on a
model, and what keeps its plain path is told, never passed over in silence. The trainer and the
memory room call the same function, so what is foreseen is what runs.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from qlora_trainer.base.norm import tile_norms
from qlora_trainer.base.tiled_attention import attends_in_tiles, keep_probabilities
from qlora_trainer.lora.fuse import fuse_mlps
from qlora_trainer.lora.fuse_qkv import fuse_qkv
from qlora_trainer.lora.inject import adapted_layers


@dataclass(frozen=True)
class Techniques:
    """Which are on; as in the run file.

    Attributes:
        fused_mlp: Gate, up, activation and down as one function.
        mlp_tile_tokens: Its tokens at one time; None takes all.
        tiled_norms: RMSNorms without fp32 copies of the residual stream.
        mlp_keeps_inner: A fused MLP keeps what gate and up give, in layers that keep their
            activations (`plan_activations`).
        fused_qkv: q, k and v as one function, turned in one go.
        fused_linear: An adapter and its linear base as one function; off: torch's own operators.
        attention_keeps_probabilities: Tiled attention keeps its probabilities, in layers that keep
            their activations.
    """

    fused_mlp: bool = False
    mlp_tile_tokens: int | None = None
    tiled_norms: bool = False
    mlp_keeps_inner: bool = False
    fused_qkv: bool = False
    fused_linear: bool = True
    attention_keeps_probabilities: bool = False


def apply_techniques(model: nn.Module, techniques: Techniques) -> list[str]:
    """Put them on a model that has its adapters.

    Returns:
        What keeps its plain path and why, in words for the user.
    """
    notes: list[str] = []
    if techniques.fused_mlp:
        found = fuse_mlps(model, techniques.mlp_tile_tokens, keeps_inner=techniques.mlp_keeps_inner)
        notes += _kept("train.fused_mlp", "MLP", len(found.modules), found.kept)
    if techniques.fused_qkv:
        found = fuse_qkv(model)
        notes += _kept("train.fused_qkv", "attention", len(found.modules), found.kept)
    if techniques.tiled_norms:
        replaced, kept = tile_norms(model)
        notes += _kept("train.tiled_norms", "norm", len(replaced), kept)
    if not techniques.fused_linear:  # of what is left; q, k and v or an MLP in one have their own
        for layer in adapted_layers(model).values():
            layer.fused = False
    keep_probabilities(model, kept=techniques.attention_keeps_probabilities)
    if techniques.attention_keeps_probabilities and not attends_in_tiles(model):
        notes.append(
            "train.attention_keeps_probabilities: attention does not run in tiles here, so nothing "
            "is kept"
        )
    return notes


def _kept(setting: str, what: str, replaced: int, kept: Mapping[str, str]) -> list[str]:
    if not replaced and not kept:
        return [f"{setting}: this model has no {what} we know; the plain path is kept"]
    return [
        f"{setting}: {count} {what}{'s' if count > 1 else ''} of {replaced + len(kept)} "
        f"keep{'' if count > 1 else 's'} the plain path: {reason}"
        for reason, count in Counter(kept.values()).items()
    ]
