"""What each decoder layer does with its activations: keep them, or compute them again.

transformers' layers read `gradient_checkpointing` and `_gradient_checkpointing_func` from
themselves, so setting both on an *instance* gives every layer its own plan without patching
anything. A layer of another kind gets its forward wrapped, on the instance. Recomputation restores
the random state, so gradients are those of a kept layer, bit for bit, dropout included. Below the
lowest trained parameter nothing is needed in the backward, and nothing is computed again.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_trainer.base.select import trained_heads

Activation = Literal["keep", "recompute"]
_PLAIN_FORWARD = "_forward_that_keeps_activations"


@dataclass(frozen=True)
class ActivationPlan:
    """What was set, by layer path; `recompute` layers below the lowest adapter became `keep`."""

    layers: dict[str, Activation]

    @property
    def recomputed(self) -> int:
        """Layers computed again in the backward."""
        return sum(choice == "recompute" for choice in self.layers.values())


def plan_activations(
    model: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    wanted: Activation | Sequence[Activation],
) -> ActivationPlan:
    """Set every layer's plan; call it again to change it.

    Args:
        model: Adapters already on it.
        layers: Its decoder layers in the order they run, by path.
        wanted: One choice for all, or one per layer.

    Raises:
        ValueError: As many choices as layers are needed.
    """
    choices = [wanted] * len(layers) if isinstance(wanted, str) else list(wanted)
    if len(choices) != len(layers):
        raise ValueError(f"{len(choices)} choices for {len(layers)} layers")
    trained_below = _trained_before(model, [layer for _, layer in layers])
    plan: dict[str, Activation] = {}
    for (name, layer), choice in zip(layers, choices, strict=True):
        trained_below = trained_below or any(p.requires_grad for p in layer.parameters())
        plan[name] = choice if trained_below else "keep"
        _set(layer, recompute=plan[name] == "recompute")
    return ActivationPlan(plan)


def _trained_before(model: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Whether something outside layers and head is trained (embeddings): all layers then matter."""
    later = {id(p) for layer in layers for p in layer.parameters()}
    inputs = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = set() if inputs is None else {id(p) for p in inputs.parameters()}
    heads = [] if head is None else [head]
    heads += [model.get_submodule(path) for path in trained_heads(model)]
    later |= {id(p) for above in heads for p in above.parameters()} - tied
    return any(p.requires_grad and id(p) not in later for p in model.parameters())


def _set(layer: nn.Module, *, recompute: bool) -> None:
    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=True)
    if isinstance(layer, GradientCheckpointingLayer):
        layer.gradient_checkpointing = recompute
        layer._gradient_checkpointing_func = again
        return
    plain: Callable[..., Any] | None = layer.__dict__.pop(_PLAIN_FORWARD, None)
    if plain is not None:
        layer.forward = plain
    if not recompute:
        return
    forward = layer.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return again(forward, *args, **kwargs) if layer.training else forward(*args, **kwargs)

    layer.__dict__[_PLAIN_FORWARD] = forward
    layer.forward = recomputed
