"""Finding the stack of repeated layers in any transformers model, without knowing its name.

transformers derives every repeated layer from `GradientCheckpointingLayer` and keeps them in a
`ModuleList`; older and remote code keeps as many equal modules as the configuration has layers.
"""

from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every repeated layer with its path, in the order of the model; empty if none is found.

    An encoder's layers count as well (BERT, T5, the vision tower of a multimodal model);
    `layer_stacks` keeps the stacks apart.
    """
    return [layer for stack in layer_stacks(model).values() for layer in stack]


def layer_count(model: nn.Module) -> int:
    """Layers of the deepest stack: layer numbers, in an encoder and a decoder alike, are below."""
    return max((len(stack) for stack in layer_stacks(model).values()), default=0)


def layer_stacks(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """Path of each stack -> its layers with their full paths, in the order of the model."""
    stacks = dict(_stacks(model, "", expected=_layer_counts(model)))
    return {
        path: [(f"{path}.{index}", layer) for index, layer in enumerate(stack)]
        for path, stack in stacks.items()
    }


def _stacks(
    module: nn.Module, path: str, *, expected: set[int]
) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList) and _is_stack(child, expected):
            yield child_path, child  # a layer inside a layer is not a layer of the model
        else:
            yield from _stacks(child, child_path, expected=expected)


def _is_stack(modules: nn.ModuleList, expected: set[int]) -> bool:
    if len(modules) == 0:
        return False
    if all(isinstance(module, GradientCheckpointingLayer) for module in modules):
        return True
    alike = len({type(module) for module in modules}) == 1
    made_of_parts = any(
        True for _ in modules[0].children()
    )  # a list of norms is no stack of layers
    return alike and made_of_parts and len(modules) in expected


def _layer_counts(model: nn.Module) -> set[int]:
    """How many layers the model's configuration, or one of its parts, says there are.

    One layer says nothing: any list of a single module would match.
    """
    config = cast(Any, getattr(model, "config", None))
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "vision_config"))]
    counts = {getattr(part, "num_hidden_layers", None) for part in parts}
    return {count for count in counts if isinstance(count, int) and count > 1}


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """What transformers calls the model's input embeddings; a convolutional network has none."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        return cast("nn.Module | None", getter()) if callable(getter) else None
    except NotImplementedError:
        return None
