"""Adapter files in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`.

A file is read whole or refused whole: every missing, extra or misshapen key and every value that is
not finite is listed in one error, before the model is touched. Pickled weights are never opened.
Writing goes beside the final place and is renamed, so a reader sees the old adapter or the new one.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_trainer.base.files import replace_folder, write_atomically
from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import adapted_layers, inject_adapter
from qlora_trainer.lora.kind import kind_of
from qlora_trainer.lora.layer import LowRankLayer
from qlora_trainer.lora.peft_config import (
    CONFIG_NAME,
    config_from_model,
    read_json,
    spec_from_config,
    untrained_saved_paths,
)
from qlora_trainer.lora.select import select_modules
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.lora.trained import select_saved_modules, tied_groups, trained_copies

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

logger = logging.getLogger(__name__)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's live tensors under PEFT's keys: factors, then modules trained in full."""
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model).items():
        key_A, key_B = layer.kind.file_keys
        tensors[f"{PREFIX}{name}.{key_A}"] = layer.lora_A.detach()
        tensors[f"{PREFIX}{name}.{key_B}"] = layer.lora_B.detach()
    for path, module in trained_copies(model).items():
        tensors.update(_module_tensors(path, module))
    return tensors


def _module_tensors(path: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{PREFIX}{path}.{key}": value for key, value in module.state_dict().items()}


def save_adapter(
    model: nn.Module,
    spec: AdapterSpec,
    folder: Path,
    *,
    base_source: str | None,
    task_type: str | None = None,
    base_revision: str | None = None,
) -> None:
    """Write the adapter a model carries, for PEFT and for `load_adapter`.

    Args:
        model: The model with its adapter.
        spec: What it was injected with.
        folder: Made if need be; other files in it are left alone.
        base_source: The base, as PEFT shall load it: a hub name, or a folder's absolute path, since
            PEFT looks for it from wherever it is run.
        task_type: PEFT's name of the task (`CAUSAL_LM`, `SEQ_CLS`, ...). For classification and
            question answering PEFT looks for the head in the file, so it is written, trained or
            not.
        base_revision: The base's revision.
    """
    tensors = adapter_tensors(model)
    for path in untrained_saved_paths(model, task_type):
        tensors.update(_module_tensors(path, model.get_submodule(path)))
    # Own memory for each: tied copies share theirs, which the format has no words for.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    config = config_from_model(
        model, spec, base_source=base_source, base_revision=base_revision, task_type=task_type
    )
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"

    def write_weights(path: Path) -> None:
        save_file(tensors, path, metadata={"format": "pt"})

    def write_config(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    def fill(new: Path) -> None:
        write_weights(new / WEIGHTS_NAME)
        write_config(new / CONFIG_NAME)

    if folder.exists():
        write_atomically(folder / WEIGHTS_NAME, write_weights)
        write_atomically(folder / CONFIG_NAME, write_config)
    else:
        replace_folder(folder, fill)


def read_adapter_config(folder: Path) -> AdapterSpec:
    """Read what an adapter is, without its weights.

    Raises:
        UserError: The file is missing or broken, or asks for what we do not carry out.
    """
    path = Path(folder) / CONFIG_NAME
    return spec_from_config(read_json(path), path)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read an adapter's tensors, on the CPU, under the keys of the file.

    Raises:
        UserError: No safetensors file, a broken one, or values that are not finite.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        if path.with_suffix(".bin").is_file():
            raise UserError(
                f"{path.with_suffix('.bin')}: pickled weights can run code and are not opened; "
                "if you trust them, load them with PEFT and write them again with "
                "model.save_pretrained(FOLDER, safe_serialization=True)"
            )
        raise UserError(f"{path}: there is no such file; the folder holds no adapter weights")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
    faults = [
        f"{key}: {int((~torch.isfinite(value)).sum())} of {value.numel()} values are NaN or "
        "infinite; the run that wrote it had diverged"
        for key, value in tensors.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if faults:
        raise UserError.from_faults(f"{path}: values are not finite", faults)
    return tensors


def load_adapter(
    model: nn.Module, folder: Path, *, dtype: torch.dtype, trainable: bool
) -> AdapterSpec:
    """Put an adapter from a folder, ours or PEFT's, on a base model.

    Args:
        model: The base, without an adapter; unchanged where an error is raised.
        folder: Holds the two files.
        dtype: Of factors and trained copies in the model.
        trainable: Whether they require gradients.

    Returns:
        What the file says, `modules_to_save` as the paths it means in this model.

    Raises:
        UserError: The files are broken, unsupported, or do not fit the model; keys that are
            missing, extra or misshapen are all listed.
    """
    folder = Path(folder)
    spec = read_adapter_config(folder)
    found = read_tensors(folder)
    saved = select_saved_modules(model, spec.modules_to_save, strict=False)
    spec = replace(spec, modules_to_save=tuple(saved))
    selected = select_modules(model, spec, strict=False)
    expected: dict[str, tuple[int, ...]] = {}
    for name in selected:
        base = model.get_submodule(name)
        kind = kind_of(base)
        assert kind is not None
        for key, shape in zip(kind.file_keys, kind.shapes(base, spec.rank_of(name)), strict=True):
            expected[f"{PREFIX}{name}.{key}"] = shape
    for path in saved:
        tensors = _module_tensors(path, model.get_submodule(path))
        expected.update({key: tuple(value.shape) for key, value in tensors.items()})
    _check_keys(folder / WEIGHTS_NAME, expected, _without_base_copies(model, found, expected))
    untie = any(not _stays_tied(group, saved, found) for group in tied_groups(model))
    inject_adapter(model, spec, dtype=dtype, strict=False, untie=untie)
    _copy_into(model, found)
    for tensor in (*_factors(model), *_copied(model)):
        tensor.requires_grad_(trainable and tensor.is_floating_point())
    return spec


def restore_adapter(model: nn.Module, folder: Path) -> None:
    """Read an adapter's values into a model that already carries the same adapter.

    Raises:
        UserError: As `load_adapter`; the model is unchanged.
    """
    found = read_tensors(Path(folder))
    expected = {key: tuple(value.shape) for key, value in adapter_tensors(model).items()}
    known = _without_base_copies(model, found, expected)
    _check_keys(Path(folder) / WEIGHTS_NAME, expected, known)
    _copy_into(model, found)


def _factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for layer in adapted_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def _copied(model: nn.Module) -> list[nn.Parameter]:
    return [p for module in trained_copies(model).values() for p in module.parameters()]


@torch.no_grad()
def _copy_into(model: nn.Module, found: dict[str, Tensor]) -> None:
    for key, tensor in adapter_tensors(model).items():
        tensor.copy_(found[key])


def _check_keys(path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, Tensor]) -> None:
    faults = [f"missing: {key} {shape}" for key, shape in expected.items() if key not in found]
    faults += [f"extra: {key} {tuple(v.shape)}" for key, v in found.items() if key not in expected]
    faults += [
        f"misshapen: {key} is {tuple(found[key].shape)}, the model needs {shape}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != shape
    ]
    if faults:
        raise UserError.from_faults(f"{path} does not fit this model", faults, shown=1000)


def _without_base_copies(
    model: nn.Module, found: dict[str, Tensor], expected: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Leave out base weights PEFT repeats in the file, where they equal the model's own."""
    kept = {}
    for key, value in found.items():
        path = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")[0]
        if key not in expected and key.endswith(".weight") and _is_weight_of(model, path, value):
            logger.info("%s repeats the base's weight; left out", key)
            continue
        kept[key] = value
    return kept


def _is_weight_of(model: nn.Module, path: str, value: Tensor) -> bool:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    module = module.base if isinstance(module, LowRankLayer) else module
    weight = module._parameters.get("weight")
    if weight is None or weight.shape != value.shape:
        return False
    return torch.equal(value.to(weight.dtype), weight.detach().cpu())


def _stays_tied(group: list[str], saved: list[str], found: dict[str, Tensor]) -> bool:
    keys = [f"{PREFIX}{path}.weight" for path in group if path in saved]
    if not keys:
        return True
    values = [found[key] for key in keys]
    return len(keys) == len(group) and all(torch.equal(values[0], v) for v in values[1:])
