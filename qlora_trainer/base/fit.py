"""Does this folder fit this model class? Asked of the configuration, then of the loaded keys.

transformers warns about a weight that is missing and draws random numbers for it, or leaves one
unread; either trains a broken model in silence. Here both are errors that list every key, but for
the head of a new task, which the checkpoint cannot have.
"""

from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from qlora_trainer.base.checkpoint import Checkpoint, read_config_file
from qlora_trainer.base.select import head_paths
from qlora_trainer.errors import UserError

# What transformers' configuration classes raise on values they cannot take.
_CONFIG_FAULTS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, RuntimeError,
    ImportError, AssertionError, StrictDataclassError,
)  # fmt: skip


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model configuration of a folder, as transformers reads it.

    Raises:
        UserError: `config.json` is missing or broken, or names a model transformers lacks.
    """
    raw = read_config_file(folder)
    kind = raw.get("model_type")
    if "auto_map" in raw and not trust_remote_code and kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"{folder}: model type {kind!r} comes with its own Python code; read that code, then "
            "set model.trust_remote_code = true"
        )
    if not isinstance(kind, str) or (
        kind not in transformers.CONFIG_MAPPING and "auto_map" not in raw
    ):
        raise UserError(
            f"{folder}/config.json: model_type = {kind!r} is not known to transformers "
            f"{transformers.__version__}; name a model it has, or update transformers"
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except _CONFIG_FAULTS as error:
        raise UserError(f"{folder}/config.json does not describe a {kind}: {error}") from error


def check_class(model_class: Any, config: Any, source: str) -> None:
    """Whether the class, or one behind the auto class, is made for this configuration.

    Raises:
        UserError: It is not.
    """
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        wanted = getattr(model_class, "config_class", None)
        fits = wanted is None or isinstance(config, wanted)
    else:
        name = str(getattr(model_class, "__name__", model_class))
        fits = type(config) in mapping or name in getattr(config, "auto_map", {})
    if not fits:
        architectures = ", ".join(getattr(config, "architectures", None) or ("none named",))
        raise UserError(
            f"{source}: a {config.model_type} model does not fit {model_class.__name__} "
            f"(its architectures: {architectures}); choose the task this model is made for"
        )


def check_keys(
    model: nn.Module, info: dict[str, Any], checkpoint: Checkpoint, new_heads_allowed: bool
) -> None:
    """Every parameter came from the file and every tensor found its place, or an error."""
    heads = head_paths(model)
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    base = getattr(model, prefix, None) if prefix else None
    inside = {name for name, _ in (base or model).named_children()} | {prefix}

    def is_new_head(key: str) -> bool:
        owner = key.rpartition(".")[0]
        return new_heads_allowed and (owner in heads or "pooler" in key.split("."))

    def is_left_head(key: str) -> bool:
        return new_heads_allowed and key.split(".")[0] not in inside

    new = {key for key, *_ in info["mismatched_keys"] if is_new_head(key)}
    faults = [
        f"{key}: missing from the checkpoint"
        for key in sorted(info["missing_keys"])
        if not is_new_head(key)
    ]
    faults += [
        f"{key}: in the checkpoint, without a place in {type(model).__name__}"
        for key in sorted(info["unexpected_keys"])
        if not is_left_head(key)
    ]
    faults += [
        f"{key}: shape {tuple(found)} in the checkpoint, {tuple(wanted)} in the model"
        for key, found, wanted in sorted(info["mismatched_keys"])
        if key not in new
    ]
    faults += [str(message) for message in info.get("error_msgs") or ()]
    if faults:
        raise UserError.from_faults(
            f"{checkpoint.folder} does not fit {type(model).__name__}; take the checkpoint and "
            "config.json from the same release, or another task",
            faults,
        )
