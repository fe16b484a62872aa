"""What each decoder layer does with its activations: keep, compute again, or offload its input.

transformers' layers read `gradient_checkpointing` and `_gradient_checkpointing_func` from
themselves, so setting both on an *instance* gives every layer its own plan without patching
anything. A layer of another kind gets its forward wrapped, on the instance. Recomputation restores
the random state, so gradients are those of a kept layer, bit for bit, dropout included. Below the
lowest trained parameter nothing is needed in the backward, and nothing is computed again. An
offloaded layer is a recomputed one whose input waits in host memory (`offload.py`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_trainer.base.host_embedding import compute_device
from qlora_trainer.base.layer_stream import bringing
from qlora_trainer.base.layers import input_embeddings
from qlora_trainer.base.select import trained_heads
from qlora_trainer.base.tiled_attention import keep_probabilities
from qlora_trainer.base.transfers import Transfers
from qlora_trainer.lora.fuse import FusedGatedMLP
from qlora_trainer.training.offload import Offload

Activation = Literal["keep", "recompute", "offload"]
_PLAIN_FORWARD = "_forward_that_keeps_activations"
_CHECKPOINT = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=True)


@dataclass(frozen=True)
class ActivationPlan:
    """What was set, by layer path; layers below the lowest adapter became `keep`."""

    layers: dict[str, Activation]

    @property
    def recomputed(self) -> int:
        """Layers computed again in the backward."""
        return sum(choice != "keep" for choice in self.layers.values())

    @property
    def offloaded(self) -> int:
        """Layers whose input waits in host memory."""
        return sum(choice == "offload" for choice in self.layers.values())


def plan_activations(
    model: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    wanted: Activation | Sequence[Activation],
    *,
    transfers: Transfers | None = None,
) -> ActivationPlan:
    """Set every layer's plan; call it again to change it.

    Args:
        model: Adapters already on it.
        layers: Its decoder layers in the order they run, by path.
        wanted: One choice for all, or one per layer. The last layer is never offloaded: the
            backward begins with it.
        transfers: Moves offloaded inputs; made for the model's device unless given.

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
    if layers and plan[layers[-1][0]] == "offload":
        plan[layers[-1][0]] = "recompute"
    offload = None
    if "offload" in plan.values():
        offload = Offload(transfers or Transfers(compute_device(model)))
    again: Callable[..., Any] = _CHECKPOINT
    for name, layer in layers:
        if offload is not None:
            again = offload.layer(to_host=plan[name] == "offload")
        _set(layer, None if plan[name] == "keep" else again)
        for part in layer.modules():
            if isinstance(part, FusedGatedMLP):
                part.is_recomputed = plan[name] != "keep"
        keep_probabilities(layer, recomputed=plan[name] != "keep")
    return ActivationPlan(plan)


def _trained_before(model: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Whether something outside layers and head is trained (embeddings): all layers then matter."""
    later = {id(p) for layer in layers for p in layer.parameters()}
    inputs = input_embeddings(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = set() if inputs is None else {id(p) for p in inputs.parameters()}
    heads = [] if head is None else [head]
    heads += [model.get_submodule(path) for path in trained_heads(model)]
    later |= {id(p) for above in heads for p in above.parameters()} - tied
    return any(p.requires_grad and id(p) not in later for p in model.parameters())


def _set(layer: nn.Module, again: Callable[..., Any] | None) -> None:
    """Let `again(forward, *args)` run the layer in training; None: its forward as it is."""
    if isinstance(layer, GradientCheckpointingLayer):
        layer.gradient_checkpointing = again is not None
        layer._gradient_checkpointing_func = None if again is None else _brought(layer, again)
        return
    plain: Callable[..., Any] | None = layer.__dict__.pop(_PLAIN_FORWARD, None)
    if plain is not None:
        layer.forward = plain
    if again is None:
        return
    forward = layer.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return again(forward, *args, **kwargs) if layer.training else forward(*args, **kwargs)

    layer.__dict__[_PLAIN_FORWARD] = forward
    layer.forward = recomputed


def _brought(layer: nn.Module, again: Callable[..., Any]) -> Callable[..., Any]:
    """`again` where the layer's weights may have left when its forward runs for the second time."""
    return lambda forward, *args: again(bringing(layer, forward), *args)
