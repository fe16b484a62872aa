"""The frozen base: from a folder of safetensors to a model in NF4, one tensor at a time.

transformers builds the model with its parameters still in the files (memory-mapped: no private
memory is used); then every parameter goes to its place by itself: quantized there from the dtype
the checkpoint has, or cast to the compute dtype. So host memory never holds more than what stays
plus the tensor at hand. Nothing is upcast "for stability": what a model really needs in fp32 its
class says, and the audit shows it.

`build_weightless_base` runs the same replacing code on a model without weights, for foresight.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_trainer.base.checkpoint import Checkpoint, open_checkpoint, read_config_file
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.prequantized import (
    check_quantization,
    is_bitsandbytes_linear,
    select_prequantized,
)
from qlora_trainer.base.quantize import QUANTIZABLE_DTYPES
from qlora_trainer.base.select import head_paths, select_quantized, stays_fp32
from qlora_trainer.errors import UserError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BaseSpec:
    """How the base is to be held.

    Attributes:
        quantization: "nf4" or "none" (16 bit, or 32 with an fp32 compute dtype).
        double_quant: Keep block scales in 8 bits.
        block_size: Weights per scale.
        compute_dtype: Of products, norms, embeddings, heads and the residual stream.
        attention: transformers' `attn_implementation`, or None for its own choice.
        keep_unquantized: More layers to leave in 16 bit, by path or part of a path.
        trust_remote_code: Whether the checkpoint may bring its own Python.
    """

    quantization: str
    double_quant: bool = True
    block_size: int = 64
    compute_dtype: torch.dtype = torch.bfloat16
    attention: str | None = None
    keep_unquantized: tuple[str, ...] = ()
    trust_remote_code: bool = False


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
            "set base.trust_remote_code = true"
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
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise UserError(f"{folder}/config.json does not describe a {kind}: {error}") from error


def load_base(
    folder: Path,
    model_class: Any,
    spec: BaseSpec,
    device: torch.device,
    *,
    progress: Progress | None = None,
    new_heads_allowed: bool = False,
    head_seed: int = 0,
    config_changes: dict[str, Any] | None = None,
) -> Any:
    """Load a checkpoint as the frozen base.

    Args:
        folder: With `config.json` and safetensors.
        model_class: A transformers model class or auto class, such as `AutoModelForCausalLM`.
        spec: How to hold it.
        device: Where the model shall live.
        progress: Called with (path, number, count) for every tensor put in its place.
        new_heads_allowed: The checkpoint may lack the head of `model_class` (a classifier on a
            language model), or bring one it has no place for.
        head_seed: Decides the weights of such a new head.
        config_changes: Settings of the model configuration the task decides, such as `num_labels`.

    Returns:
        The model, evaluating, `use_cache` off, no parameter wanting a gradient.

    Raises:
        UserError: The folder is not whole, the class does not fit, or keys are missing or left.
    """
    checkpoint = open_checkpoint(folder)
    config = load_config(folder, trust_remote_code=spec.trust_remote_code)
    _check_class(model_class, config, str(folder))
    check_quantization(config, spec.quantization, str(folder))
    _change_config(config, config_changes)
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        torch.manual_seed(head_seed)
        model, info = model_class.from_pretrained(
            str(folder),
            config=config,
            dtype=_reading_dtype(checkpoint, config, spec),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, together with all other faults
            **_class_arguments(spec),
        )
    _check_keys(model, info, checkpoint, new_heads_allowed)
    buffers = _buffer_dtypes(build_weightless_base(config, model_class, spec))
    return _settle(model, spec, device, buffers, progress)


def build_weightless_base(config: Any, model_class: Any, spec: BaseSpec) -> Any:
    """The model `load_base` would give for this configuration, on the `meta` device.

    Raises:
        UserError: The class does not fit the configuration.
    """
    _check_class(model_class, config, str(config.model_type))
    check_quantization(config, spec.quantization, str(config.model_type))
    # A copy: transformers writes the chosen dtype and attention into the configuration.
    build = getattr(model_class, "from_config", None) or model_class._from_config
    arguments = _class_arguments(spec)
    if not hasattr(model_class, "from_config"):
        arguments.pop("trust_remote_code")
    with torch.device("meta"), _quiet_transformers():
        model = build(copy.deepcopy(config), dtype=spec.compute_dtype, **arguments)
    return _settle(model, spec, torch.device("meta"), _buffer_dtypes(model), None)


def _class_arguments(spec: BaseSpec) -> dict[str, Any]:
    attention = {} if spec.attention is None else {"attn_implementation": spec.attention}
    return {"trust_remote_code": spec.trust_remote_code, **attention}


def _change_config(config: Any, changes: dict[str, Any] | None) -> None:
    for name, value in (changes or {}).items():
        setattr(config, name, value)


def _reading_dtype(checkpoint: Checkpoint, config: Any, spec: BaseSpec) -> torch.dtype:
    """The dtype to ask transformers for: the files' own, so that nothing is copied to be cast.

    `dtype="auto"` would believe `config.json`, which may say another dtype than the files have.
    """
    if getattr(config, "quantization_config", None) is not None:
        return spec.compute_dtype
    return checkpoint.dtype


def _check_class(model_class: Any, config: Any, source: str) -> None:
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


def _check_keys(
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


def _buffer_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """What every buffer is in when the model is built for the compute dtype.

    Rotary frequencies, for one, are fp32 in every model; the class knows, so it is asked.
    """
    return {name: buffer.dtype for name, buffer in model.named_buffers()}


def _settle(
    model: Any,
    spec: BaseSpec,
    device: torch.device,
    buffers: dict[str, torch.dtype],
    progress: Progress | None,
) -> Any:
    """Put every tensor where and how it shall stay; the model is changed in place."""
    ready_made = select_prequantized(model)
    if ready_made is not None:
        selection = ready_made
    else:
        selection = select_quantized(model, spec.keep_unquantized)
    quantized = selection.quantized if spec.quantization == "nf4" else ()
    places = _parameter_places(model, set(quantized))
    count = len(quantized) + len(places)
    for number, path in enumerate(quantized, start=1):
        _replace(model, path, _quantize(path, model.get_submodule(path), spec, device))
        if progress is not None:
            progress(path, number, count)
    fp32 = stays_fp32(model, fp16=spec.compute_dtype == torch.float16)
    for number, owners in enumerate(places, start=len(quantized) + 1):
        path, name = owners[0]
        full_name = f"{path}.{name}" if path else name
        original = cast(Tensor, getattr(model.get_submodule(path), name)).detach()
        dtype = torch.float32 if fp32 and fp32.search(full_name) else spec.compute_dtype
        settled = nn.Parameter(_moved(original, device, dtype), requires_grad=False)
        for path, name in owners:
            setattr(model.get_submodule(path), name, settled)
        if progress is not None:
            progress(full_name, number, count)
    _settle_buffers(model, set(quantized), device, buffers)
    for part in model.modules():
        if hasattr(getattr(part, "config", None), "use_cache"):
            part.config.use_cache = False
    model.kept_unquantized = dict(selection.kept) if spec.quantization == "nf4" else {}
    return model.eval()


def _parameter_places(model: nn.Module, quantized: set[str]) -> list[list[tuple[str, str]]]:
    """(module path, name) of all owners of each parameter outside the layers to quantize.

    Tied parameters have several owners and are settled once, so they stay one parameter.
    """
    places: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        if path not in quantized:
            for name, parameter in module.named_parameters(recurse=False):
                places.setdefault(id(parameter), []).append((path, name))
    return list(places.values())


def _quantize(path: str, module: nn.Module, spec: BaseSpec, device: torch.device) -> NF4Linear:
    transposed = isinstance(module, Conv1D)
    if is_bitsandbytes_linear(module):
        transposed = getattr(module, "source_cls", None) is Conv1D
        return NF4Linear.from_linear4bit(
            module, compute_dtype=spec.compute_dtype, device=device, fan_in_fan_out=transposed
        )
    weight = cast(Tensor, module.weight)
    if weight.dtype not in QUANTIZABLE_DTYPES:
        weight = weight.float()
    try:
        return NF4Linear.quantize(
            weight,
            cast("Tensor | None", module.bias),
            compute_dtype=spec.compute_dtype,
            device=device,
            block_size=spec.block_size,
            double_quant=spec.double_quant,
            fan_in_fan_out=transposed,
        )
    except ValueError as error:
        raise UserError(f"{path}.weight {error}; the checkpoint is damaged or unfit") from error


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of its own, also where nothing changes: the source may be a mapped file."""
    target = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.to(device, target, copy=True)


def _settle_buffers(
    model: nn.Module, quantized: set[str], device: torch.device, dtypes: dict[str, torch.dtype]
) -> None:
    for path, module in model.named_modules():
        if path in quantized:
            continue
        for name, buffer in list(module.named_buffers(recurse=False)):
            full_name = f"{path}.{name}" if path else name
            dtype = dtypes.get(full_name, buffer.dtype)
            module._buffers[name] = _moved(buffer.detach(), device, dtype)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bar and load report out of the way; ours say the same and more."""
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
