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
from qlora_trainer.base.host_head import host_head, keep_head_on_host
from qlora_trainer.base.layer_shards import Peers, ShardStore, WeightlessShards
from qlora_trainer.base.layer_stream import HostStore, LayerStream, Store, streamed_layers
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
    peers: Peers | None = None,
) -> Any:
    """Settle a whole model, in place.

    Args:
        model: As transformers made it, with weights or on `meta`.
        spec: How to hold it.
        device: Where.
        buffers: Dtype of every buffer, by path.
        progress: Called with (path, number, count) for every tensor put in its place.
        peers: The processes that hold the other parts of sharded layers; none on `meta`.

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
    store = _store(spec, device, peers)
    layers = [] if store is None else streamed_layers(model, store.setting)
    settling = _Settling(model, spec, device, buffers, progress)
    if store is not None:
        model.layer_stream = LayerStream(store)
        in_host_memory = spec.stream_layers and device.type != "meta"
        home = torch.device("cpu") if in_host_memory else device
        for path, layer in layers:  # shared out one by one: no two are whole on the device
            settling.settle(f"{path}.", home)
            model.layer_stream.add(path, layer)
    settling.settle("", device)
    if spec.embeddings_on_host:
        keep_on_host(model, device)
    if spec.head_on_host:
        keep_head_on_host(model, device)
    for part in model.modules():
        _settle_config(getattr(part, "config", None), spec.compute_dtype)
    for mark in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit"):
        if getattr(model, mark, None) is not None:
            setattr(model, mark, None)  # its quantized layers are ours now
    model.kept_unquantized = dict(settling.kept) if spec.quantization == "nf4" else {}
    freeze_batch_norms(model)
    return model.eval()


def _store(spec: BaseSpec, device: torch.device, peers: Peers | None) -> Store | None:
    """Where the layers wait; None where they stay on the device."""
    if spec.stream_layers:
        return HostStore(Transfers(device))
    if spec.layer_parts == 1:
        return None
    if device.type == "meta":
        return WeightlessShards(spec.layer_parts)
    if peers is None or peers.count != spec.layer_parts:
        raise ValueError(f"{spec.layer_parts} parts of every layer need as many processes")
    return ShardStore(device, peers)


class _Settling:
    """A model on its way to where it stays, part by part.

    Attributes:
        kept: Path -> why, of layers outside NF4.
    """

    def __init__(
        self,
        model: Any,
        spec: BaseSpec,
        device: torch.device,
        buffers: dict[str, torch.dtype],
        progress: Progress | None,
    ) -> None:
        self._model, self._spec, self._device = model, spec, device
        self._buffers, self._progress = buffers, progress
        ready_made = select_prequantized(model)
        if ready_made is not None:
            selection = ready_made
        else:
            selection = select_quantized(model, spec.keep_unquantized)
        self.kept = selection.kept
        self._quantized = selection.quantized if spec.quantization == "nf4" else ()
        on_host = []
        if spec.head_on_host:
            on_host.append(host_head(model, embeddings_on_host=spec.embeddings_on_host))
        if spec.embeddings_on_host:
            on_host.append(host_table(model, beside=on_host))
        self._on_host = {id(parameter) for parameter in on_host}
        self._host_modules = {
            path
            for path, module in model.named_modules()
            if any(id(p) in self._on_host for p in module.parameters(recurse=False))
        }
        self._places = _parameter_places(model, set(self._quantized))
        self._count, self._number = len(self._quantized) + len(self._places), 0
        self._fp32 = stays_fp32(model, fp16=spec.compute_dtype == torch.float16)
        self._done: tuple[str, ...] = ()

    def settle(self, prefix: str, home: torch.device) -> None:
        """Settle all whose path begins so and has not been settled, at home on this device."""
        for path in self._quantized:
            if self._has_turn(path, prefix):
                module = self._model.get_submodule(path)
                layer = quantize_layer(path, module, self._spec, self._device)
                _replace(self._model, path, layer.to(home))
                self._told(path)
        for owners in self._places:
            if self._has_turn(_full_name(*owners[0]), prefix):
                self._settle_parameter(owners, home)
        self._settle_buffers(prefix, home)
        self._done += (prefix,)

    def _has_turn(self, name: str, prefix: str) -> bool:
        return name.startswith(prefix) and not name.startswith(self._done)

    def _settle_parameter(self, owners: list[tuple[str, str]], home: torch.device) -> None:
        path, name = owners[0]
        full_name = _full_name(path, name)
        original = cast(Tensor, getattr(self._model.get_submodule(path), name))
        fp32 = self._fp32 is not None and self._fp32.search(full_name)
        dtype = torch.float32 if fp32 else self._spec.compute_dtype
        # What stays on the host stays where transformers made it: there, or on `meta`.
        place = original.device if id(original) in self._on_host else home
        settled = nn.Parameter(_moved(original.detach(), place, dtype), requires_grad=False)
        for path, name in owners:
            setattr(self._model.get_submodule(path), name, settled)
        self._told(full_name)

    def _settle_buffers(self, prefix: str, home: torch.device) -> None:
        quantized = set(self._quantized)
        for path, module in self._model.named_modules():
            if path in quantized:
                continue
            for name, buffer in list(module.named_buffers(recurse=False)):
                full_name = _full_name(path, name)
                if self._has_turn(full_name, prefix):
                    dtype = self._buffers.get(full_name, buffer.dtype)
                    # Gemma multiplies what its table gave, there, by a scale held in a buffer.
                    place = buffer.device if path in self._host_modules else home
                    module._buffers[name] = _moved(buffer.detach(), place, dtype)

    def _told(self, path: str) -> None:
        self._number += 1
        if self._progress is not None:
            self._progress(path, self._number, self._count)


def _full_name(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


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


def buffer_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """What every buffer is in when the model is built for the compute dtype.

    Rotary frequencies, for one, are fp32 in every model; the class knows, so it is asked.
    """
    return {name: buffer.dtype for name, buffer in model.named_buffers()}
