"""Modules trained in full beside the adapter (`modules_to_save`), and tied embeddings among them.

The module's place in the model is taken by a trainable copy of the same class, so the rest of the
model, and the keys in a file, see nothing new. The frozen original is kept aside on the CPU, off
the card, for `adapters_disabled`. A copy whose dtype differs from the model's (float32 on a float16
model) casts what goes in and what comes out.

Tied embeddings (one matrix as token embedding and head): naming one of the two is refused, since
training it would silently end the tie and change what the model can be exported to; naming both
trains one copy and keeps the tie. PEFT's files may hold two that differ: loading those unties, and
says so in the log and in `config.tie_word_embeddings`.
"""

import copy
import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.base.head import QuantizedHead
from qlora_trainer.base.host_head import HostHead
from qlora_trainer.base.layer_stream import stream_of
from qlora_trainer.errors import UserError
from qlora_trainer.lora.kind import kind_of
from qlora_trainer.lora.layer import LowRankLayer
from qlora_trainer.lora.select import candidates, nearest
from qlora_trainer.lora.spec import is_named

logger = logging.getLogger(__name__)
_ORIGINAL = "_original_of_trained_copy"


@dataclass
class _Original:
    """Holds a module without registering it: no parameter of the model, not moved with it."""

    module: nn.Module


def select_saved_modules(
    model: nn.Module, names: tuple[str, ...], *, strict: bool = True
) -> list[str]:
    """Paths of the modules trained in full, outermost only.

    Args:
        model: The base.
        names: Whole paths, or their ends after a dot.
        strict: Also refuse names that match nothing. Not strict, names are a PEFT file's and mean
            what they mean to PEFT: any path that *ends* so, dot or no dot.

    Raises:
        UserError: A name matches nothing, or a module cannot be trained in full.
    """
    modules = candidates(model)
    stream = stream_of(model)
    faults = [
        f"adapter.modules_to_save: {name!r} matches no module; {nearest(name, modules)}"
        for name in names
        if strict and not any(is_named(path, (name,)) for path in modules)
    ]
    found: list[str] = []
    for path, module in modules.items():
        meant = is_named(path, names) if strict else path.endswith(names)
        if not meant or any(path.startswith(f"{outer}.") for outer in found):
            continue
        found.append(path)
        inner = list(module.modules())
        if any(isinstance(m, LowRankLayer) for m in inner):
            faults.append(f"adapter.modules_to_save: {path} carries an adapter; choose one of both")
        elif isinstance(module, nn.ModuleList | nn.ModuleDict):
            faults.append(f"adapter.modules_to_save: {path} is a container; name what is inside it")
        elif stream is not None and any(name.startswith(f"{path}.") for name in stream.names):
            faults.append(
                f"adapter.modules_to_save: {path} comes and goes with its layer "
                f"({stream.store.setting} = true) and cannot be trained in full"
            )
        elif isinstance(module, QuantizedHead):
            faults.append(
                f"adapter.modules_to_save: {path} is quantized and cannot be trained in full; set "
                "model.head_bits: 16"
            )
        elif isinstance(module, HostHead):
            faults.append(
                f"adapter.modules_to_save: {path} waits in host memory and cannot be trained in "
                "full; set model.head_on_host: false"
            )
        elif any(hasattr(m, "dense_weight") or _is_packed(m) for m in inner):
            faults.append(
                f"adapter.modules_to_save: {path} is held in 4 bits and cannot be trained in full; "
                "keep it unquantized"
            )
        elif not any(True for _ in module.parameters()):
            faults.append(f"adapter.modules_to_save: {path} has no parameters to train")
    if faults:
        raise UserError.from_faults("modules_to_save does not fit the model", faults)
    return found


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and kind_of(module) is None


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Paths of modules whose weight is one and the same parameter (embedding and head)."""
    owners: dict[int, list[str]] = {}
    for path, module in candidates(model).items():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    return [paths for paths in owners.values() if len(paths) > 1]


def replace_by_trained_copies(
    model: nn.Module, paths: list[str], *, dtype: torch.dtype, untie: bool = False
) -> None:
    """Put a trainable copy in each module's place.

    Args:
        model: The base.
        paths: Modules, as `select_saved_modules` gives them.
        dtype: Of the copies' floating parameters.
        untie: Allow a copy of a tied weight to leave its partner.

    Raises:
        UserError: Only one of two tied modules is named.
    """
    inside = tuple(f"{path}." for path in paths)
    for group in tied_groups(model):
        copied = [p for p in group if p in paths or p.startswith(inside)]
        if copied and not untie and len(copied) < len(group):
            rest = [p for p in group if p not in copied]
            raise UserError(
                f"adapter.modules_to_save: {', '.join(copied)} shares its weight with "
                f"{', '.join(rest)}; "
                "training one would end the tie: name both (trained as one), or neither"
            )
        if copied and untie:
            logger.warning("%s: no longer tied, each has its own weight now", ", ".join(group))
            config = getattr(model, "config", None)
            if config is not None and getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
    copies: dict[int, Any] = {}  # one memo for all copies, so that what is tied stays tied
    for path in paths:
        original = model.get_submodule(path)
        trained = copy.deepcopy(original, {} if untie else copies)
        _make_trainable(trained, original, dtype)
        if any(tensor.device.type not in ("cpu", "meta") for tensor in original.parameters()):
            # The parameter may be tied to one that stays: move a copy of the module, not itself.
            original = copy.deepcopy(original).to("cpu")
        trained.__dict__[_ORIGINAL] = _Original(original.requires_grad_(False))
        set_module(model, path, trained)


def _make_trainable(module: nn.Module, original: nn.Module, dtype: torch.dtype) -> None:
    # The original tells the dtype around it: of two tied copies the second is converted already.
    before = next(p.dtype for p in original.parameters() if p.is_floating_point())
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    if before != dtype:
        module.register_forward_pre_hook(functools.partial(_cast_inputs, dtype), with_kwargs=True)
        module.register_forward_hook(functools.partial(_cast_output, before))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _cast_inputs(
    dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _cast(args, dtype), {key: _cast(value, dtype) for key, value in kwargs.items()}


def _cast_output(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return _cast(output, dtype)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of this model instance."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, nn.ModuleList | nn.Sequential):
        owner[int(name)] = module
    else:
        setattr(owner, name, module)


def trained_copies(model: nn.Module) -> dict[str, nn.Module]:
    """The trainable copies by path."""
    return {path: m for path, m in model.named_modules() if _ORIGINAL in m.__dict__}


def original_of(trained: nn.Module, device: torch.device) -> nn.Module:
    """The frozen original of a trained copy, on the device the copy is on now."""
    original: _Original = trained.__dict__[_ORIGINAL]
    if device.type == "meta":
        return original.module
    # `.to` moves in place: a copy, so that the original stays off the card.
    return original.module if device.type == "cpu" else copy.deepcopy(original.module).to(device)
