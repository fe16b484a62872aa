"""The first half of the proof: base + adapter as training ran it, its logits left in a file.

The base is held as in training (NF4 where it was), whole in memory or, where it does not fit, one
layer at a time from its files: the same modules, the same values, the same order of rows.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from qlora_trainer.base.load import load_base, map_base
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.quantize import QUANTIZABLE_DTYPES
from qlora_trainer.base.select import select_quantized, stays_fp32
from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.base.tiled_attention import leave_tiled_attention
from qlora_trainer.errors import UserError
from qlora_trainer.export import plain
from qlora_trainer.export.adapter import FittedAdapter
from qlora_trainer.export.proof import Precision, ProofRequest, Row
from qlora_trainer.export.source import ExportSource
from qlora_trainer.export.turns import MappedParts, run_in_turns
from qlora_trainer.lora.files import load_adapter
from qlora_trainer.lora.trained import select_saved_modules, set_module


@dataclass(frozen=True)
class References:
    """Logits of base + adapter in a file, and which positions they are of."""

    file: Path
    rows_file: Path
    counts: list[int]
    columns: list[int]
    shift: bool
    auto_class: str


def write_references(
    folder: Path,
    source: ExportSource,
    adapter: FittedAdapter,
    request: ProofRequest,
    rows: Sequence[Row],
    *,
    precision: Precision,
    by: str = "model",
) -> References:
    """Run base + adapter as training ran it and leave its logits in a folder.

    Args:
        folder: Where the file goes.
        source: Base and adapter.
        adapter: Fitted to the base.
        request: Where to run.
        rows: What is compared, as `chosen_rows` gives them.
        precision: "native" or "fp32".
        by: "model", or "layer": hold one layer at a time.

    Raises:
        UserError: The base does not load, or no row has a position that counts.
    """
    if precision == "fp32":
        spec = dataclasses.replace(source.spec, compute_dtype=torch.float32)
        source = dataclasses.replace(source, spec=spec)
    if by == "layer":
        model, parts = trained_in_parts(source, adapter, request.device)
    else:
        model, parts = load_trained(source, adapter, request.device), None
    shift = is_causal(model)

    def logits_of(number: int) -> Tensor:
        row = rows[number]
        return plain.compared_logits(model, row, shift=shift, device=request.device)[0]

    found: Iterator[Tensor] = (
        map(logits_of, range(len(rows)))
        if parts is None
        else run_in_turns(len(rows), logits_of, parts.parts, load=parts.load, unload=parts.unload)
    )
    counts: list[int] = []
    columns: list[int] = []
    with (folder / f"reference-{precision}").open("wb") as file:
        for logits in found:
            file.write(logits.contiguous().numpy().data)
            counts.append(logits.shape[0])
            columns.append(logits.shape[1])
    if sum(counts) == 0:
        raise UserError(
            "the proof has nothing to compare: no position of its rows counts; give other rows, "
            "or export without the proof (--no-proof)"
        )
    rows_file = folder / "rows.safetensors"
    save_file(
        # Own memory for each: labels are often the very tensor of the inputs.
        {f"{i}.{n}": v.clone().contiguous() for i, row in enumerate(rows) for n, v in row.items()},
        rows_file,
    )
    return References(
        Path(file.name), rows_file, counts, columns, shift, auto_class_name(type(model).__name__)
    )


def load_trained(source: ExportSource, adapter: FittedAdapter, device: torch.device) -> Any:
    """Base + adapter, as training held them, whole in memory.

    Attention is what a stranger's process takes, for what is proven is the weights.
    """
    model = load_base(
        source.base_folder, source.model_class, source.spec, device, new_heads_allowed=True,
        config_changes=dict(source.config_changes),
    )  # fmt: skip
    leave_tiled_attention(model)
    return _with_adapter(model, source, adapter)


def _with_adapter(model: Any, source: ExportSource, adapter: FittedAdapter) -> Any:
    dtype = source.spec.compute_dtype
    if adapter.vocabulary is not None:
        model.resize_token_embeddings(adapter.vocabulary, mean_resizing=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # Whole weights beside the adapter proper: new rows of resized embeddings, mostly.
    for name, value in adapter.replaced.items():
        parameter = parameters.get(name)
        owner = name.rpartition(".")[0]
        in_full = any(f".{wanted}." in f".{owner}." for wanted in adapter.spec.modules_to_save)
        if parameter is not None and not in_full:
            kept = dtype if parameter.is_floating_point() else parameter.dtype
            parameter.data = value.to(parameter.device, kept)
    load_adapter(model, source.adapter_folder, dtype=dtype, trainable=False)
    return model.eval()


def trained_in_parts(
    source: ExportSource, adapter: FittedAdapter, device: torch.device
) -> tuple[Any, MappedParts]:
    """Base + adapter whose base weights are read, and quantized, when their layer's turn comes."""
    spec = source.spec
    model, buffers = map_base(
        source.base_folder, source.model_class, spec, new_heads_allowed=True,
        config_changes=dict(source.config_changes),
    )  # fmt: skip
    for path, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            wanted = buffers.get(f"{path}.{name}" if path else name, buffer.dtype)
            module._buffers[name] = buffer.to(wanted)
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
    quantized: dict[int, nn.Module] = {}
    if spec.quantization == "nf4":
        for path in select_quantized(model, spec.keep_unquantized).quantized:
            quantized[id(model.get_submodule(path))] = model.get_submodule(path)
    _settle_outside_layers(model, quantized, spec, device)
    for path in select_saved_modules(model, adapter.spec.modules_to_save, strict=False):
        for parameter in model.get_submodule(path).parameters():
            # A trained copy answers in the dtype its original had when the copy was made.
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(spec.compute_dtype)
    model = _with_adapter(model, source, adapter)
    strict = stays_fp32(model, fp16=spec.compute_dtype == torch.float16)

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if strict and strict.search(name) else spec.compute_dtype

    swapped = {key: _quantizer(module, spec, device) for key, module in quantized.items()}
    return model, MappedParts(model, dtype_of, device, swapped)


def _settle_outside_layers(
    model: nn.Module, quantized: dict[int, nn.Module], spec: BaseSpec, device: torch.device
) -> None:
    """Quantize for good what lies outside the repeated layers: a pooler, a projection."""
    inside = {
        id(module)
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
        for module in layer.modules()
    }
    for path, module in list(model.named_modules()):
        if id(module) in quantized and id(module) not in inside:
            set_module(model, path, _quantizer(quantized.pop(id(module)), spec, device)())


def _quantizer(module: nn.Module, spec: BaseSpec, device: torch.device) -> Any:
    """Makes the 4-bit layer of a plain one, from where its weight lies now."""
    weight = cast(Tensor, module.weight).detach()
    bias = cast("Tensor | None", module.bias)
    bias = None if bias is None else bias.detach()

    def quantize() -> nn.Module:
        return NF4Linear.quantize(
            weight if weight.dtype in QUANTIZABLE_DTYPES else weight.float(), bias,
            compute_dtype=spec.compute_dtype, device=device, block_size=spec.block_size,
            double_quant=spec.double_quant, fan_in_fan_out=isinstance(module, Conv1D),
        ).eval()  # fmt: skip

    return quantize


def is_causal(model: Any) -> bool:
    """Whether logits at one position stand for the next token."""
    name = type(model).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel")) and not model.config.is_encoder_decoder


_AUTO_CLASSES = (
    ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ("ForCausalLM", "AutoModelForCausalLM"),
    ("LMHeadModel", "AutoModelForCausalLM"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "AutoModelForTokenClassification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
    ("ForImageClassification", "AutoModelForImageClassification"),
    ("ForMultipleChoice", "AutoModelForMultipleChoice"),
)


def auto_class_name(architecture: str) -> str:
    """The auto class a stranger would open such a model with.

    >>> auto_class_name("LlamaForCausalLM")
    'AutoModelForCausalLM'
    """
    found = (auto for ending, auto in _AUTO_CLASSES if architecture.endswith(ending))
    return next(found, architecture)
