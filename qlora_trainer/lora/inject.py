"""Putting an adapter on a model instance, finding its parts again, and switching it off.

Modules are replaced in the instance; no class or function of a library is touched. Everything else
in the model is frozen, so the trainable parameters are the adapter's and nothing but.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from qlora_trainer.base.select import trained_heads
from qlora_trainer.errors import UserError
from qlora_trainer.lora.layer import LowRankLayer
from qlora_trainer.lora.select import select_modules as select_modules
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.lora.trained import (
    original_of,
    replace_by_trained_copies,
    select_saved_modules,
    set_module,
    tied_groups,
    trained_copies,
)

logger = logging.getLogger(__name__)


def with_heads(spec: AdapterSpec, model: nn.Module) -> AdapterSpec:
    """The adapter with the head of the model's task among what is trained in full and saved."""
    saved = dict.fromkeys((*spec.modules_to_save, *trained_heads(model)))
    return replace(spec, modules_to_save=tuple(saved))


def inject_adapter(
    model: nn.Module,
    spec: AdapterSpec,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    strict: bool = True,
    untie: bool = False,
) -> list[str]:
    """Freeze the model and put the adapter on it.

    Args:
        model: The base; plain, 4-bit or without weights (meta).
        spec: The adapter.
        dtype: Of factors and trained copies: the compute dtype, or float32 on float16 devices.
        seed: Decides the first values, module by module.
        strict: See `select_modules`.
        untie: See `replace_by_trained_copies`.

    Returns:
        Paths of the adapted modules. Nothing has been changed where an error is raised.

    Raises:
        UserError: The adapter does not fit the model.
    """
    saved = select_saved_modules(model, spec.modules_to_save, strict=strict)
    selected = select_modules(model, spec, strict=strict)
    if trained_copies(model):
        raise UserError("the model already carries an adapter; one at a time")
    for group in tied_groups(model):
        if adapted := [name for name in group if name in selected]:
            logger.warning(
                "%s share one weight; the adapter on %s is its own: merged, they need two weights",
                ", ".join(group),
                ", ".join(adapted),
            )
    replace_by_trained_copies(model, saved, dtype=dtype, untie=untie)
    trained = {id(p) for copy in trained_copies(model).values() for p in copy.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    for name in selected:
        layer = LowRankLayer(
            model.get_submodule(name),
            name=name,
            rank=spec.rank_of(name),
            scale=spec.scaling(name),
            dropout=spec.dropout,
            dtype=dtype,
            seed=seed,
        )
        layer.train(model.training)
        set_module(model, name, layer)
    return selected


def adapted_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The low-rank layers by path, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLayer)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Factors and trained copies' parameters under their names in the model; tied ones once."""
    owners = {**adapted_layers(model), **trained_copies(model)}
    prefixes = tuple(f"{name}." for name in owners)
    wanted = {
        id(parameter)
        for owner in owners.values()
        for name, parameter in owner.named_parameters()
        if not (isinstance(owner, LowRankLayer) and name.startswith("base."))
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes) and id(parameter) in wanted
    }


def zero_initialised_factor(layer: LowRankLayer) -> tuple[str, nn.Parameter]:
    """Name and factor that starts at zero: the one whose gradient after one step must not be."""
    name = layer.kind.zero_factor
    return name, layer.lora_A if name == "lora_A" else layer.lora_B


def reset_reached(model: nn.Module) -> None:
    """Forget which layers have run."""
    for layer in adapted_layers(model).values():
        layer.reached = False


def unreached_layers(model: nn.Module) -> list[str]:
    """Adapted modules that have not run since `reset_reached`: they learn nothing."""
    return [name for name, layer in adapted_layers(model).items() if not layer.reached]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within, the model is its base: no low-rank product, the original of every trained copy."""
    layers = adapted_layers(model)
    before = {name: layer.enabled for name, layer in layers.items()}
    copies = trained_copies(model)
    try:
        for layer in layers.values():
            layer.enabled = False
        for path, trained in copies.items():
            original = original_of(trained, next(trained.parameters()).device)
            set_module(model, path, original.train(trained.training))
        yield
    finally:
        for path, trained in copies.items():
            set_module(model, path, trained)
        for name, layer in layers.items():
            layer.enabled = before[name]
