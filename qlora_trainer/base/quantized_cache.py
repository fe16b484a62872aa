"""A quantized base kept on disk in bitsandbytes' own checkpoint format: quantized once, then read.

The folder holds what transformers saves of a 4-bit model: `config.json` with its
`quantization_config`, each NF4 weight's codes beside its scales and `quant_state`, everything else
as the source has it. transformers reads it too, and `load_base` finds the bits it would have made.

The folder's name is a digest of all that decides those bits: the source's configuration and the
checksums of its shards, the way of quantizing and the kind of device it was done on. `cache.json`
holds the SHA-256 of every file. A folder that is not what it says is told and made anew. The
source's checksums are remembered beside the copies (`base/checksums.py`).

Given up: checkpoints with Python of their own, and heads that the source lacks.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_trainer.base.checkpoint import INDEX_FILE, open_checkpoint, read_config_file
from qlora_trainer.base.checksums import remembered_checksums, sha256_of_files
from qlora_trainer.base.files import replace_folder
from qlora_trainer.base.load import map_base
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.prequantized import quantization_settings, select_prequantized
from qlora_trainer.base.quantize import quant_state
from qlora_trainer.base.select import select_quantized
from qlora_trainer.base.settle import Progress, quantize_layer
from qlora_trainer.base.spec import BaseSpec

logger = logging.getLogger(__name__)
_FORMAT = 1  # to be raised with any change of what is written
_RECORD = "cache.json"
_SOURCES = "sources.json"  # checksums of sources, beside the copies
_SHARD_BYTES = 2**30


def cached_base(
    folder: Path,
    cache: Path,
    model_class: Any,
    spec: BaseSpec,
    device: torch.device,
    *,
    progress: Progress | None = None,
) -> Path:
    """The folder to load a base from: its quantized copy, made where there is none that is whole.

    Args:
        folder: The source, with `config.json` and safetensors.
        cache: Where copies are kept.
        model_class: As for `load_base`.
        spec: How the base is held.
        device: Where it is quantized.
        progress: Called with (path, number, count) for every layer quantized.

    Returns:
        The copy; the source itself where that is quantized already.

    Raises:
        UserError: The source is not whole, or does not fit the class.
    """
    copy = cache / _key(folder, cache, model_class, spec, device)[:32]
    faults = damages(copy) if copy.exists() else ["is not there yet"]
    if not faults:
        return copy
    model, _ = map_base(folder, model_class, spec.plain())
    if quantization_settings(model.config) is not None:
        return folder
    if copy.exists():
        logger.warning("%s is damaged (%s); quantizing anew", copy, "; ".join(faults))
    selection = select_quantized(model, spec.keep_unquantized)
    settings = _settings(spec, tuple(selection.kept))
    model.config.quantization_config = settings
    found = select_prequantized(model)
    del model.config.quantization_config
    if found is None or set(found.quantized) != set(selection.quantized):
        logger.warning("%s: transformers would read other layers as 4-bit; not cached", folder)
        return folder

    def fill(partial: Path) -> None:
        _write(partial, model, selection.quantized, spec, device, progress)
        config = read_config_file(folder) | {"quantization_config": settings}
        (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        (partial / _RECORD).write_text(json.dumps(_digests(partial), indent=1), encoding="utf-8")

    replace_folder(copy, fill)
    return copy


def damages(copy: Path) -> list[str]:
    """What is wrong with a copy; nothing where every file is what was written."""
    try:
        wanted = json.loads((copy / _RECORD).read_text(encoding="utf-8"))
        found = _digests(copy)
    except (OSError, ValueError) as error:
        return [f"{_RECORD} cannot be read: {error}"]
    if not isinstance(wanted, dict) or not wanted:
        return [f"{_RECORD} names no files"]
    names = sorted(wanted.keys() | found.keys())
    return [f"{name} is not as written" for name in names if wanted.get(name) != found.get(name)]


def _digests(copy: Path) -> dict[str, str]:
    files = sorted(file for file in copy.iterdir() if file.name != _RECORD)
    return {file.name: digest for file, digest in sha256_of_files(files).items()}


def _key(folder: Path, cache: Path, model_class: Any, spec: BaseSpec, device: torch.device) -> str:
    checkpoint = open_checkpoint(folder)
    shards = {folder / header.file for header in checkpoint.tensors.values()}
    checksums = remembered_checksums(shards, cache / _SOURCES)
    about = {
        "format": _FORMAT,
        "config": checkpoint.config,
        "source": {str(shard.relative_to(folder)): digest for shard, digest in checksums.items()},
        "class": model_class.__name__,
        "double_quant": spec.double_quant,
        "block_size": spec.block_size,
        "keep_unquantized": sorted(spec.keep_unquantized),
        "device": device.type,
        "bitsandbytes": bitsandbytes.__version__,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _settings(spec: BaseSpec, kept: tuple[str, ...]) -> dict[str, Any]:
    """`quantization_config` as transformers writes it."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": str(spec.compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(kept),
    }


def _write(
    partial: Path,
    model: Any,
    quantized: tuple[str, ...],
    spec: BaseSpec,
    device: torch.device,
    progress: Progress | None,
) -> None:
    """All shards and their index; one layer is dense and one shard in memory at a time."""
    shards = _Shards(partial)
    for number, path in enumerate(quantized, start=1):
        module = model.get_submodule(path)
        layer = quantize_layer(path, module, spec, device)
        shards.add(_tensors_of(f"{path}.weight", layer))
        if module.bias is not None:
            shards.add({f"{path}.bias": module.bias.detach()})
        if progress is not None:
            progress(path, number, len(quantized))
    inside = {f"{path}.{name}" for path in quantized for name in ("weight", "bias")}
    lasting = model.state_dict()
    tensors = [*model.named_parameters(), *model.named_buffers()]  # tied ones once
    for name, tensor in tensors:
        if name in lasting and name not in inside:
            shards.add({name: tensor.detach()})
    shards.finish()


def _tensors_of(name: str, layer: NF4Linear) -> dict[str, Tensor]:
    """A weight's tensors under the names bitsandbytes gives them."""
    shape = (layer.out_features, layer.in_features)
    state = quant_state(layer.tensors, shape, layer.block_size, layer.compute_dtype)
    parts = {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    return {name: layer.codes.view(-1, 1), **parts}


class _Shards:
    """Tensors gathered into files of about a gibibyte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        self._held: dict[str, Tensor] = {}
        self._count = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors; what is held is written first where it would get too much."""
        size_bytes = sum(t.nbytes for t in (*self._held.values(), *tensors.values()))
        if self._held and size_bytes > _SHARD_BYTES:
            self._flush()
        for name, tensor in tensors.items():
            self._held[name] = tensor.to("cpu", copy=True).contiguous()

    def finish(self) -> None:
        """Write what is left, and the index."""
        self._flush()
        text = json.dumps({"metadata": {}, "weight_map": self.files}, indent=1)
        (self.folder / INDEX_FILE).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        self._count += 1
        file = f"model-{self._count:05d}.safetensors"
        save_file(self._held, self.folder / file, metadata={"format": "pt"})
        self.files |= dict.fromkeys(self._held, file)
        self._held = {}
