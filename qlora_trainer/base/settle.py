"""Put every tensor of a model where and how it shall stay, one at a time.

Each linear layer is quantized from the dtype it has in the checkpoint, every other parameter is
cast to the compute dtype, both on the device; a tied parameter is settled once and stays tied.
Every tensor becomes a copy of its own: the sources are mapped files, which may change or go.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_trainer.base.batch_norm import freeze_batch_norms
from qlora_trainer.base.head import quantize_head
from qlora_trainer.base.host_embedding import host_table, keep_on_host
from qlora_trainer.base.layer_stream import LayerStream, streamed_layers
from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.prequantized import is_bitsandbytes_linear, select_prequantized
from qlora_trainer.base.quantize import QUANTIZABLE_DTYPES
from qlora_trainer.base.select import select_quantized, stays_fp32
from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.base.transfers import Transfers
from qlora_trainer.errors import UserError

Progress = Callable[[str, int, int], None]


def settle(
    model: Any,
    spec: BaseSpec,
    device: torch.device,
    buffers: dict[str, torch.dtype],
    progress: Progress | None,
) -> Any:
    """Settle a whole model, in place.

    Args:
        model: As transformers made it, with weights or on `meta`.
        spec: How to hold it.
        device: Where.
        buffers: Dtype of every buffer, by path.
        progress: Called with (path, number, count) for every tensor put in its place.

    Returns:
        The same model, evaluating, `use_cache` off, no parameter wanting a gradient.

    Raises:
        UserError: A weight is not finite, or a layer to keep is not there.
    """
    if spec.head_bits != 16:
        quantize_head(
            model, spec.head_bits, spec.block_size, spec.compute_dtype,
            on_host=spec.embeddings_on_host,
        )  # fmt: skip
    streamed = streamed_layers(model) if spec.stream_layers else []
    home = _homes(tuple(f"{path}." for path, _ in streamed), device)
    ready_made = select_prequantized(model)
    if ready_made is not None:
        selection = ready_made
    else:
        selection = select_quantized(model, spec.keep_unquantized)
    quantized = selection.quantized if spec.quantization == "nf4" else ()
    on_host = host_table(model) if spec.embeddings_on_host else None
    places = _parameter_places(model, set(quantized))
    count = len(quantized) + len(places)
    for number, path in enumerate(quantized, start=1):
        layer = quantize_layer(path, model.get_submodule(path), spec, device)
        _replace(model, path, layer.to(home(path)))
        if progress is not None:
            progress(path, number, count)
    fp32 = stays_fp32(model, fp16=spec.compute_dtype == torch.float16)
    for number, owners in enumerate(places, start=len(quantized) + 1):
        path, name = owners[0]
        full_name = f"{path}.{name}" if path else name
        original = cast(Tensor, getattr(model.get_submodule(path), name))
        dtype = torch.float32 if fp32 and fp32.search(full_name) else spec.compute_dtype
        # What stays on the host stays where transformers made it: there, or on `meta`.
        place = original.device if original is on_host else home(full_name)
        settled = nn.Parameter(_moved(original.detach(), place, dtype), requires_grad=False)
        for path, name in owners:
            setattr(model.get_submodule(path), name, settled)
        if progress is not None:
            progress(full_name, number, count)
    _settle_buffers(model, set(quantized), home, buffers)
    if on_host is not None:
        keep_on_host(model)
    for part in model.modules():
        _settle_config(getattr(part, "config", None), spec.compute_dtype)
    for mark in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit"):
        if getattr(model, mark, None) is not None:
            setattr(model, mark, None)  # its quantized layers are ours now
    model.kept_unquantized = dict(selection.kept) if spec.quantization == "nf4" else {}
    freeze_batch_norms(model)
    if streamed:
        # read anew: quantized layers have taken the places of others
        model.layer_stream = LayerStream(decoder_layers(model), Transfers(device))
    return model.eval()


def _homes(streamed: tuple[str, ...], device: torch.device) -> Callable[[str], torch.device]:
    """Path -> where a tensor or layer of the model is settled; streamed layers wait on the host."""
    host = device if device.type == "meta" else torch.device("cpu")
    return lambda path: host if f"{path}.".startswith(streamed) else device


def _settle_config(config: Any, compute_dtype: torch.dtype) -> None:
    """Say in the configuration of the model or a part of it what is true now."""
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if hasattr(config, "dtype"):
        config.dtype = compute_dtype
    if hasattr(config, "quantization_config"):
        # Its layers are ours now; left in, transformers would take them for its own.
        del config.quantization_config


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


def quantize_layer(path: str, module: nn.Module, spec: BaseSpec, device: torch.device) -> NF4Linear:
    """Quantize one linear layer on a device, or take it over where it is quantized already.

    Raises:
        UserError: Its weight is not finite.
    """
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
    model: nn.Module,
    quantized: set[str],
    home: Callable[[str], torch.device],
    dtypes: dict[str, torch.dtype],
) -> None:
    for path, module in model.named_modules():
        if path in quantized:
            continue
        for name, buffer in list(module.named_buffers(recurse=False)):
            full_name = f"{path}.{name}" if path else name
            dtype = dtypes.get(full_name, buffer.dtype)
            module._buffers[name] = _moved(buffer.detach(), home(full_name), dtype)


def buffer_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """What every buffer is in when the model is built for the compute dtype.

    Rotary frequencies, for one, are fp32 in every model; the class knows, so it is asked.
    """
    return {name: buffer.dtype for name, buffer in model.named_buffers()}
