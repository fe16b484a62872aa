"""`adapter_config.json`: PEFT's words for an adapter, to and from `AdapterSpec`.

Read: every field must be one we carry out, one that says nothing about the computation, or falsy.
Any other, known to today's PEFT or not, is refused by name: an adapter that computes something
else than its file says is worse than none. Written: names, not regular expressions, so that other
readers (vLLM, llama.cpp) find the same modules.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import adapted_layers
from qlora_trainer.lora.layer import LowRankLayer
from qlora_trainer.lora.select import candidates
from qlora_trainer.lora.spec import AdapterSpec, is_named
from qlora_trainer.lora.trained import trained_copies

CONFIG_NAME = "adapter_config.json"

# Say where the adapter comes from or how the base stores its weight, which the base itself knows.
# `layers_pattern` only narrows how PEFT reads layer numbers; the keys in the file prove the result.
NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# First values that leave the base's weights as they are; after training they say nothing.
HARMLESS_INITS = (True, False, None, "gaussian")
# Modules PEFT adds to `modules_to_save` by itself, so a file must hold them where a model has them.
IMPLIED_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_number(value: Any) -> bool:
    # A whole number of JSON may be too long for any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_table(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(of(item) for item in value.values())


# field: (may be left out or null, test, what it must be)
FIELDS: dict[str, tuple[bool, Callable[[Any], bool], str]] = {
    "r": (False, _is_whole, "a whole number"),
    "lora_alpha": (False, _is_number, "a number"),
    "lora_dropout": (True, _is_number, "a number"),
    "use_rslora": (True, lambda v: isinstance(v, bool), "true or false"),
    "target_modules": (
        False,
        lambda v: isinstance(v, str) or _is_names(v),
        "a list of names or a regular expression",
    ),
    "exclude_modules": (
        True,
        lambda v: isinstance(v, str) or _is_names(v),
        "a list of names or a regular expression",
    ),
    "layers_to_transform": (
        True,
        lambda v: _is_whole(v) or (isinstance(v, list) and all(map(_is_whole, v))),
        "a layer number or a list of them",
    ),
    "modules_to_save": (True, _is_names, "a list of names"),
    "rank_pattern": (True, lambda v: _is_table(v, _is_whole), "a table of whole numbers"),
    "alpha_pattern": (True, lambda v: _is_table(v, _is_number), "a table of numbers"),
}


def adapter_in(folder: Path) -> Path | None:
    """The adapter of a run folder, or the folder itself where it is one; None where neither is."""
    for place in (folder / "adapter", folder):
        if (place / CONFIG_NAME).is_file():
            return place
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, naming file, line and column of what is broken.

    Raises:
        UserError: The file is missing, not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file; give the folder that holds {CONFIG_NAME}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; write it again") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; too deep
        raise UserError(f"{path}: cannot be read ({error}); write it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, must be an object {{...}}")
    return value


def spec_from_config(config: dict[str, Any], source: Path) -> AdapterSpec:
    """Turn PEFT's fields into ours.

    Raises:
        UserError: A field is missing, has the wrong type, or asks for what we do not carry out;
            all of them together.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{source}: peft_type = {kind!r}: only 'LORA' adapters can be read")
    faults = []
    for name, (optional, test, must) in FIELDS.items():
        value = config.get(name)
        if not ((optional and value is None) or test(value)):
            faults.append(f"{name} = {value!r}: must be {must}")
    for name, value in config.items():
        if name == "bias" and value not in ("none", None):
            faults.append(f"bias = {value!r}: trained biases are not supported, only 'none'")
        elif name == "init_lora_weights" and value not in HARMLESS_INITS:
            faults.append(
                f"init_lora_weights = {value!r}: belongs to changed base weights; in PEFT, save "
                "with path_initial_model_for_weight_conversion to get an ordinary adapter"
            )
        elif name not in {*FIELDS, *NEUTRAL, "bias", "init_lora_weights"} and value:
            faults.append(f"{name} = {_short(value)}: this PEFT feature is not supported")
    if faults:
        raise UserError.from_faults(f"{source}: this adapter cannot be used", faults)
    layers: Any = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    return AdapterSpec(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora")),
        target_modules=_frozen(config["target_modules"]),
        layers=tuple(layers) if layers else None,
        exclude_modules=_frozen(config.get("exclude_modules") or []),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )


def _frozen(names: str | list[str]) -> str | tuple[str, ...]:
    return names if isinstance(names, str) else tuple(names)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def config_from_model(
    model: nn.Module,
    spec: AdapterSpec,
    *,
    base_source: str | None,
    base_revision: str | None,
    task_type: str | None,
) -> dict[str, Any]:
    """PEFT's fields for the adapter a model carries."""
    layers = adapted_layers(model)
    saved = [*trained_copies(model), *untrained_saved_paths(model, task_type)]
    if any(_carries_adapter(model, name) for name in _implied(model, task_type)):
        task_type = None  # PEFT would train that head in full instead
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_source,
        "revision": base_revision,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "target_modules": _target_names(model, list(layers), saved),
        "modules_to_save": saved or None,
        "rank_pattern": spec.rank_pattern,
        "alpha_pattern": spec.alpha_pattern,
        "fan_in_fan_out": any(layer.kind.name == "conv1d" for layer in layers.values()),
        "bias": "none",
        "init_lora_weights": True,
        "use_dora": False,
        "lora_bias": False,
    }


def _target_names(model: nn.Module, adapted: list[str], saved: list[str]) -> list[str]:
    """Last names where these mean exactly the adapted modules, whole paths otherwise."""
    endings = tuple(sorted({name.rpartition(".")[2] for name in adapted}))
    inside = tuple(f"{name}." for name in saved)
    meant = [
        name
        for name in candidates(model)
        if is_named(name, endings) and name not in saved and not name.startswith(inside)
    ]
    return list(endings) if sorted(meant) == sorted(adapted) else sorted(adapted)


def peft_saved_paths(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Modules PEFT trains in full for these names: any whose path *ends* so, dot or no dot."""
    found: list[str] = []
    for path in candidates(model):
        if path.endswith(names) and not f"{path}.".startswith(tuple(f"{f}." for f in found)):
            found.append(path)
    return found


def _implied(model: nn.Module, task_type: str | None) -> list[str]:
    return peft_saved_paths(model, IMPLIED_HEADS.get(task_type or "", ()))


def _carries_adapter(model: nn.Module, path: str) -> bool:
    return any(isinstance(m, LowRankLayer) for m in model.get_submodule(path).modules())


def untrained_saved_paths(model: nn.Module, task_type: str | None) -> list[str]:
    """Modules PEFT will look for in the file although they were not trained in full."""
    trained = list(trained_copies(model))
    within = tuple(f"{path}." for path in trained)
    meant = [*_implied(model, task_type), *peft_saved_paths(model, tuple(trained))]
    return [
        path
        for path in dict.fromkeys(meant)
        if not f"{path}.".startswith(within) and not _carries_adapter(model, path)
    ]
