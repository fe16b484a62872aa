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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from qlora_trainer.base.checkpoint import Checkpoint, open_checkpoint
from qlora_trainer.base.expanded_attention import use_expanded_attention
from qlora_trainer.base.fit import check_class, check_keys, load_config
from qlora_trainer.base.layer_shards import Peers
from qlora_trainer.base.prequantized import check_quantization, quantization_settings
from qlora_trainer.base.settle import Progress, buffer_dtypes, settle
from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.base.tiled_attention import chooses_tiles, use_tiled_attention

__all__ = ["BaseSpec", "Progress", "build_weightless_base", "load_base", "load_config"]


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
    peers: Peers | None = None,
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
        peers: The processes that hold the other parts of the layers, where they share them.

    Returns:
        The model, evaluating, `use_cache` off, no parameter wanting a gradient.

    Raises:
        UserError: The folder is not whole, the class does not fit, or keys are missing or left.
    """
    model, buffers = map_base(
        folder, model_class, spec, new_heads_allowed=new_heads_allowed, head_seed=head_seed,
        config_changes=config_changes,
    )  # fmt: skip
    model = settle(model, spec, device, buffers, progress, peers)
    choose_attention(model, spec, device)
    return model


def choose_attention(model: Any, spec: BaseSpec, device: torch.device) -> None:
    """Give a model the attention its device computes best; what the user chose stays."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        use_expanded_attention(model, capability, spec.compute_dtype)
    if device.type == "cpu" and chooses_tiles(spec.attention, spec.compute_dtype):
        use_tiled_attention(model)


def map_base(
    folder: Path,
    model_class: Any,
    spec: BaseSpec,
    *,
    new_heads_allowed: bool = False,
    head_seed: int = 0,
    config_changes: dict[str, Any] | None = None,
) -> tuple[Any, dict[str, torch.dtype]]:
    """A checkpoint as transformers makes it: in the files' dtype, weights still in the files.

    Args:
        folder: As for `load_base`, and so are the others.
        model_class: The class.
        spec: How it will be held.
        new_heads_allowed: The head may be new.
        head_seed: Decides the weights of a new head.
        config_changes: Settings the task decides.

    Returns:
        The model, and the dtype each buffer shall have once it is settled.

    Raises:
        UserError: As `load_base`.
    """
    checkpoint = open_checkpoint(folder)
    config = load_config(folder, trust_remote_code=spec.trust_remote_code)
    check_class(model_class, config, str(folder))
    check_quantization(config, spec.quantization, str(folder))
    _change_config(config, config_changes)
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        torch.default_generator.manual_seed(head_seed)
        model, info = model_class.from_pretrained(
            str(folder),
            config=config,
            **_reading_arguments(checkpoint, config, spec),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, together with all other faults
            **_class_arguments(spec),
        )
    check_keys(model, info, checkpoint, new_heads_allowed)
    return model, buffer_dtypes(build_weightless_base(config, model_class, spec))


def build_weightless_base(config: Any, model_class: Any, spec: BaseSpec) -> Any:
    """The model `load_base` would give for this configuration, on the `meta` device.

    Raises:
        UserError: The class does not fit the configuration.
    """
    check_class(model_class, config, str(config.model_type))
    check_quantization(config, spec.quantization, str(config.model_type))
    # A copy: transformers writes the chosen dtype and attention into the configuration.
    build = getattr(model_class, "from_config", None) or model_class._from_config
    arguments = _class_arguments(spec)
    if not hasattr(model_class, "from_config"):
        arguments.pop("trust_remote_code")
    with torch.device("meta"), _quiet_transformers():
        model = build(copy.deepcopy(config), dtype=spec.compute_dtype, **arguments)
    return settle(model, spec, torch.device("meta"), buffer_dtypes(model), None)


def _class_arguments(spec: BaseSpec) -> dict[str, Any]:
    attention = {} if spec.attention is None else {"attn_implementation": spec.attention}
    return {"trust_remote_code": spec.trust_remote_code, **attention}


def _change_config(config: Any, changes: dict[str, Any] | None) -> None:
    for name, value in (changes or {}).items():
        setattr(config, name, value)


def _reading_arguments(checkpoint: Checkpoint, config: Any, spec: BaseSpec) -> dict[str, Any]:
    """Ask transformers for the files' own dtype, so that nothing is copied to be cast.

    `dtype="auto"` would believe `config.json`, which may say another dtype than the files have.
    """
    if quantization_settings(config) is not None:
        # Its quantizer would go to the first GPU by itself.
        return {"dtype": spec.compute_dtype, "device_map": {"": "cpu"}}
    return {"dtype": checkpoint.dtype}


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
