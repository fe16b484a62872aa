"""The merged checkpoint, tensor by tensor, before any value is read: name, origin and change.

Tensors keep the names the base's files have, since those are what every other reader (vLLM,
llama.cpp, older transformers) knows; transformers renames some while loading, so its own renaming
says which stored tensor is which parameter. Tied weights stay one tensor unless the adapter makes
them differ, and then each is written and the configuration says so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora_trainer.errors import UserError
from qlora_trainer.export.adapter import FittedAdapter, LowRank
from qlora_trainer.export.checkpoint import StoredTensor


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the merged checkpoint.

    Attributes:
        name: In the files.
        parameter: In the model; None for a stored tensor this model class has no place for.
        source: Where the base's value lies; None where the adapter alone brings the tensor.
        replacement: A value that takes the base's place.
        update: What is added.
        quantized: The base's value was held in NF4 while training.
        transposed: It is stored as (in, out), and was quantized as (out, in).
        dtype: It is written in.
    """

    name: str
    parameter: str | None
    source: StoredTensor | None
    replacement: Tensor | None
    update: LowRank | None
    quantized: bool
    transposed: bool
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the files."""
        if self.replacement is not None:
            return tuple(self.replacement.shape)
        assert self.source is not None
        return self.source.shape


@dataclass(frozen=True)
class Plan:
    """The merged checkpoint, tensor by tensor.

    Attributes:
        tensors: In the order they are written: the base's own.
        config_changes: What `config.json` must say differently.
        left_out: Stored tensors the model class has no place for.
        dtype: Of every floating tensor.
    """

    tensors: tuple[PlannedTensor, ...]
    config_changes: dict[str, Any]
    left_out: tuple[str, ...]
    dtype: torch.dtype


def plan_export(
    model: Any,
    stored: dict[str, StoredTensor],
    adapter: FittedAdapter,
    *,
    quantized: Mapping[str, bool],
    dtype: torch.dtype,
    base_architectures: tuple[str, ...],
) -> Plan:
    """Decide what is written.

    Args:
        model: The base's class without weights, plain modules.
        stored: The base's tensors.
        adapter: Fitted to `model`.
        quantized: Path of each module held in NF4 while training -> whether its weight is stored
            transposed, as GPT-2 does.
        dtype: Of floating tensors in the export.
        base_architectures: Model classes the base's configuration names.

    Raises:
        UserError: A parameter has no value anywhere, or an adapted weight is stored in a form the
            model takes apart while loading.
    """
    names = _parameters_of(model, stored, set(adapter.updates) | set(adapter.replaced))
    keeps_unused = type(model).__name__ in base_architectures
    tensors: list[PlannedTensor] = []
    left_out: list[str] = []
    for name, source in stored.items():
        parameter = names[name]
        if parameter is None and not keeps_unused:
            left_out.append(name)
            continue
        tensors.append(_planned(name, parameter, source, adapter, quantized, dtype))
    tied, tensors = _settle_ties(model, tensors, adapter, dtype)
    present = {tensor.parameter for tensor in tensors}
    tensors += [
        PlannedTensor(key, key, None, value, None, False, False, _written_dtype(value.dtype, dtype))
        for key, value in adapter.replaced.items()
        if key not in present and tied.get(key) not in present
    ]
    _check_complete(model, tensors, tied)
    changes: dict[str, Any] = {}
    if adapter.vocabulary is not None:
        changes["vocab_size"] = adapter.vocabulary
    if tied != dict(model.all_tied_weights_keys):
        changes["tie_word_embeddings"] = False
    return Plan(tuple(tensors), changes, tuple(left_out), dtype)


def _written_dtype(own: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    return wanted if own.is_floating_point else own


def _planned(
    name: str,
    parameter: str | None,
    source: StoredTensor,
    adapter: FittedAdapter,
    quantized: Mapping[str, bool],
    dtype: torch.dtype,
) -> PlannedTensor:
    key = parameter or ""
    replacement = adapter.replaced.get(key)
    own = source.dtype if replacement is None else replacement.dtype
    path, _, leaf = key.rpartition(".")
    return PlannedTensor(
        name, parameter, source, replacement, adapter.updates.get(key),
        leaf == "weight" and path in quantized, quantized.get(path, False),
        _written_dtype(own, dtype),
    )  # fmt: skip


def _parameters_of(
    model: Any, stored: dict[str, StoredTensor], adapted: set[str]
) -> dict[str, str | None]:
    """Stored name -> parameter name, by transformers' own renaming; None for one without a place.

    Raises:
        UserError: An adapted weight is put together from, or cut out of, other stored tensors.
    """
    state = dict(model.state_dict())
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    names: dict[str, str | None] = {}
    faults = []
    for name in stored:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        names[name] = renamed if renamed in state else None
        if pattern is None:
            continue
        converter = next(entry for entry in converters if pattern in entry.source_patterns)
        targets = {renamed.replace(converter.target_patterns[0], t) for t in
                   converter.target_patterns}  # fmt: skip
        if targets & adapted:
            faults.append(f"{name} becomes {', '.join(sorted(targets))}")
        # Copied as it is stored: whatever the model makes of it while loading, it makes again.
        names[name] = f"{name} (converted)" if renamed in state else None
    if faults:
        raise UserError.from_faults(
            "the base stores adapted weights in another form than the model holds them, so they "
            "cannot be merged in place; export --format adapter instead",
            faults,
        )
    _check_unique(names)
    return names


def _check_unique(names: dict[str, str | None]) -> None:
    seen: dict[str, str] = {}
    faults = []
    for name, parameter in names.items():
        if parameter is not None and seen.setdefault(parameter, name) != name:
            faults.append(f"{name} and {seen[parameter]} are both {parameter}")
    if faults:
        raise UserError.from_faults("the base stores a parameter twice", faults)


def _settle_ties(
    model: Any, tensors: list[PlannedTensor], adapter: FittedAdapter, dtype: torch.dtype
) -> tuple[dict[str, str], list[PlannedTensor]]:
    """Which parameters stay tied, and the tensors with a value of its own for each untied one."""
    tied = dict(model.all_tied_weights_keys)
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, [source]).append(target)
    planned = list(tensors)
    for members in groups.values():
        if not any(name in adapter.updates or name in adapter.replaced for name in members):
            continue
        if not any(name in adapter.updates for name in members) and _same_value(members, adapter):
            value = adapter.replaced[members[0]]
            planned = [
                replace(t, replacement=value) if t.parameter in members else t for t in planned
            ]
            continue
        if not _can_untie(model, members):
            raise UserError(
                f"the adapter gives {', '.join(members)} different values, and a "
                f"{type(model).__name__} always ties them: no plain checkpoint can hold this "
                "model; export --format adapter instead"
            )
        planned = _untie(members, planned, adapter, dtype)
        tied = {target: source for target, source in tied.items() if target not in members}
    return tied, planned


def _same_value(members: list[str], adapter: FittedAdapter) -> bool:
    values = [adapter.replaced.get(name) for name in members]
    first = values[0]
    return first is not None and all(v is not None and torch.equal(first, v) for v in values)


def _can_untie(model: Any, members: list[str]) -> bool:
    """Whether the class, told not to tie word embeddings, leaves these apart."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.tie_word_embeddings = False
    text = config.get_text_config()
    text.tie_word_embeddings = False
    with torch.device("meta"):
        again = type(model)(config)
    return not set(members) & set(again.all_tied_weights_keys)


def _untie(
    members: list[str], tensors: list[PlannedTensor], adapter: FittedAdapter, dtype: torch.dtype
) -> list[PlannedTensor]:
    planned = {tensor.parameter: tensor for tensor in tensors}
    shared = next((planned[name] for name in members if name in planned), None)
    added = []
    for name in members:
        if name in planned or shared is None:
            continue
        replacement = adapter.replaced.get(name)
        added.append(
            replace(
                shared, name=name, parameter=name, replacement=replacement,
                update=adapter.updates.get(name),
                dtype=_written_dtype(torch.float32, dtype),
            )
        )  # fmt: skip
    return [*tensors, *added]


def _check_complete(model: Any, tensors: list[PlannedTensor], tied: dict[str, str]) -> None:
    present = {tensor.parameter for tensor in tensors}
    converted = any(p is not None and p.endswith(" (converted)") for p in present)
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    groups: dict[str, set[str]] = {}
    for source in set(tied.values()):
        members = {source, *(target for target, of in tied.items() if of == source)}
        groups.update(dict.fromkeys(members, members))
    missing = [
        name
        for name in model.state_dict()
        if not (groups.get(name, {name}) & present)
        and not any(pattern.search(name) for pattern in ignored)
    ]
    if missing and not converted:
        raise UserError.from_faults(
            f"neither the base nor the adapter has a value for parameters of "
            f"{type(model).__name__}; a head that was new in training must be in modules_to_save",
            missing,
        )
