"""Which modules carry an adapter: `all-linear`, names, or a regular expression; by decoder layer.

Names match as in PEFT (a whole path, or its end after a dot); a regular expression matches a whole
path. Nothing is passed over in silence: a name that matches nothing, a module that cannot carry an
adapter or already carries one is an error that says so by name, all of them at once.
"""

import difflib
import logging
import re
from collections.abc import Iterable

from torch import nn

from qlora_trainer.errors import UserError
from qlora_trainer.lora.kind import kind_of
from qlora_trainer.lora.layer import LowRankLayer
from qlora_trainer.lora.spec import ALL_LINEAR, AdapterSpec, is_named, match_pattern

logger = logging.getLogger(__name__)

# Heads by the field's own names, for models that do not tell their backbone apart.
HEAD_NAMES = ("lm_head", "score", "classifier", "qa_outputs", "embed_out", "classification_head")


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its path, adapted ones as one module, without what is inside them."""
    modules: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or "\0"):
            continue
        modules[name] = module
        if isinstance(module, LowRankLayer):
            inside = (*inside, f"{name}.")
    return modules


def layer_index(name: str) -> int | None:
    """Decoder layer a module belongs to: the first number in its path, as PEFT counts.

    >>> layer_index("model.layers.11.mlp.up_proj"), layer_index("model.norm")
    (11, None)
    """
    match = re.search(r"(?:^|\.)[^.]+\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def head_modules(model: nn.Module) -> list[str]:
    """Paths of output and classifier heads: what stands outside the backbone, or is named so."""
    backbone = getattr(model, "base_model", model)
    inside = {id(module) for module in backbone.modules()}
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    return [
        name
        for name, module in candidates(model).items()
        if (backbone is not model and id(module) not in inside)
        or (output is not None and module is output)
        or any(part in HEAD_NAMES for part in name.split("."))
    ]


def nearest(name: str, modules: Iterable[str]) -> str:
    """Say which module names are closest to one that matched nothing.

    >>> nearest("q_prj", ["model.layers.0.self_attn.q_proj", "model.norm"])
    'nearest: q_proj'
    """
    paths = list(modules)
    endings = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    found = difflib.get_close_matches(name, [*endings, *paths], n=3, cutoff=0.5)
    if found:
        return "nearest: " + ", ".join(dict.fromkeys(found))
    named = [ending for ending in endings if not ending.isdigit()]
    return "the model has " + ", ".join(named[:12]) + (", ..." if len(named) > 12 else "")


def _matches(name: str, wanted: str | tuple[str, ...]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return is_named(name, wanted)


def _is_within(name: str, roots: list[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def select_modules(model: nn.Module, spec: AdapterSpec, *, strict: bool = True) -> list[str]:
    """Paths of the modules an adapter goes on, in the model's order.

    Args:
        model: The base, without this adapter.
        spec: What is asked for.
        strict: Also refuse names, layers and patterns that match nothing. PEFT's files may hold
            such (they were written for several models); a run file may not.

    Raises:
        UserError: Something asked for cannot be had; all faults together.
    """
    modules = candidates(model)
    saved = [name for name in modules if is_named(name, spec.modules_to_save)]
    faults: list[str] = []
    target = spec.target_modules
    if target == ALL_LINEAR:
        heads = set(head_modules(model))
        matched = [n for n, m in modules.items() if _is_linear(m) and n not in heads]
        _tell_of_stacked_experts(modules)
    else:
        matched = [name for name in modules if _matches(name, target)]
    if strict:
        faults += _unmatched_names(target, modules, saved)
    matched = [n for n in matched if not _is_within(n, saved)]
    if spec.exclude_modules:
        matched = [n for n in matched if not _matches(n, spec.exclude_modules)]
    if spec.layers is not None:
        if strict:
            faults += _unknown_layers(spec.layers, matched)
        matched = [name for name in matched if layer_index(name) in spec.layers]
    faults += [fault for n in matched if (fault := _why_not(n, modules[n])) is not None]
    faults += _shared_modules(model, matched)
    if strict:
        faults += _unused_patterns(spec, matched)
    if not faults and not matched:
        near = nearest("", modules)
        faults.append(f"adapter.target_modules = {target!r}: matches no module; {near}")
    if faults:
        raise UserError.from_faults("the adapter does not fit the model", faults)
    return matched


def _tell_of_stacked_experts(modules: dict[str, nn.Module]) -> None:
    stacked = [
        name
        for name, module in modules.items()
        if any(
            p is not None and p.dim() == 3 and p.shape[0] > 1 for p in module._parameters.values()
        )
    ]
    if stacked:
        logger.warning(
            "all-linear: %d modules hold stacked matrices (experts), which carry no adapter: %s",
            len(stacked),
            ", ".join(stacked[:3]) + (", ..." if len(stacked) > 3 else ""),
        )


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, LowRankLayer):
        return module.kind.name in ("linear", "conv1d")
    kind = kind_of(module)
    return kind is not None and kind.name in ("linear", "conv1d")


def _unmatched_names(
    target: str | tuple[str, ...], modules: dict[str, nn.Module], saved: list[str]
) -> list[str]:
    if isinstance(target, str):
        return []
    faults = []
    for wanted in target:
        found = [name for name in modules if is_named(name, (wanted,))]
        if not found:
            faults.append(
                f"adapter.target_modules: {wanted!r} matches no module; {nearest(wanted, modules)}"
            )
        elif all(_is_within(name, saved) for name in found):
            faults.append(
                f"adapter.target_modules: {wanted!r} is trained in full by modules_to_save; "
                "name it in one"
            )
    return faults


def _unknown_layers(layers: tuple[int, ...], matched: list[str]) -> list[str]:
    known = {index for name in matched if (index := layer_index(name)) is not None}
    missing = sorted(set(layers) - known)
    if not missing or not matched:
        return []
    has = f"{min(known)} to {max(known)}" if known else "none"
    return [
        f"adapter.layers = {missing}: no targeted module stands there; the model's layers: {has}"
    ]


def _why_not(name: str, module: nn.Module) -> str | None:
    if isinstance(module, LowRankLayer):
        return f"{name} already carries an adapter; one at a time"
    if kind_of(module) is None:
        inner = [n for n, m in module.named_modules() if n and kind_of(m) is not None]
        shown = ", ".join(dict.fromkeys(n.rpartition(".")[2] for n in inner[:50]))
        way_out = f"name what is inside it: {shown}" if inner else "leave it out"
        return f"{name} is a {type(module).__name__}, which cannot carry an adapter; {way_out}"
    return None


def _shared_modules(model: nn.Module, matched: list[str]) -> list[str]:
    wanted = set(matched)
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return [
        f"{paths[0]} is the same module as {', '.join(paths[1:])}; an adapter on one path only "
        "would be two different modules: leave it out"
        for paths in names.values()
        if len(paths) > 1 and wanted.intersection(paths)
    ]


def _unused_patterns(spec: AdapterSpec, matched: list[str]) -> list[str]:
    faults = []
    for setting, patterns in (
        ("rank_pattern", spec.rank_pattern),
        ("alpha_pattern", spec.alpha_pattern),
    ):
        used = {match_pattern(patterns, name) for name in matched}
        faults += [
            f"adapter.{setting}: {key!r} matches no adapted module; {nearest(key, matched)}"
            for key in patterns
            if key not in used and matched
        ]
    return faults
