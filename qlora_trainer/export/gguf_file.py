"""Writing one GGUF file from a merged folder, a tensor at a time.

All sizes are known beforehand, so header, metadata and tensor table come first and the values
follow. Matrices are stored in the type asked for, row block by row block; vectors in float32, as
llama.cpp wants them. Embedding and head of a q4_0 file are kept in q8_0: they are what suffers
most. The 4-bit K types need llama.cpp's `llama-quantize`, whose line the report gives.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from qlora_trainer.base.load import load_config
from qlora_trainer.errors import UserError
from qlora_trainer.export.blocks import BLOCK_ELEMENTS
from qlora_trainer.export.checkpoint import MappedCheckpoint, StoredTensor
from qlora_trainer.export.gguf_model import (
    Family,
    add_metadata,
    family_of,
    refused_by,
    stored_rows,
    stretched_frequencies,
    tensor_name,
)
from qlora_trainer.export.gguf_tokenizer import add_tokenizer

TYPES = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
_F32, _F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
_Q8 = gguf.GGMLQuantizationType.Q8_0
_LARGEST_F16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class GgufFigures:
    """What a GGUF file holds.

    Attributes:
        arch: llama.cpp's architecture.
        splitter: The tokenizer's `tokenizer.ggml.pre`.
        tensors: How many.
        types: Storage type -> tensors in it.
        own_metadata: transformers can rebuild the configuration from the file alone.
    """

    arch: str
    splitter: str
    tensors: int
    types: dict[str, int]
    own_metadata: bool


def check_covered(base_folder: Path, kind: str, *, trust_remote_code: bool) -> None:
    """Refuse early what `write_gguf` would refuse late.

    Raises:
        UserError: The storage type or the model family is not covered.
    """
    if kind not in TYPES:
        raise UserError(f"--gguf-type {kind}: must be one of {', '.join(TYPES)}")
    config = load_config(base_folder, trust_remote_code=trust_remote_code)
    with refused_by(base_folder):
        family_of(config)


def write_gguf(merged: Path, file: Path, kind: str, *, name: str) -> GgufFigures:
    """Write a merged folder as one GGUF file.

    Args:
        merged: A plain checkpoint with its tokenizer.
        file: To write.
        kind: "f16", "q8_0" or "q4_0".
        name: Of the model, for the file's metadata.

    Raises:
        UserError: The model or its tokenizer is not covered, or a matrix passes fp16's range.
    """
    config: Any = load_config(merged)
    source = MappedCheckpoint(merged)
    wanted, file_type = TYPES[kind]
    with refused_by(merged):
        family = family_of(config)
        _check_sizes(config, source)
        writer = gguf.GGUFWriter(None, family.arch)
        add_metadata(writer, config, family, name)
        stretched = stretched_frequencies(config)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    splitter = add_tokenizer(writer, merged, config.vocab_size)
    names = gguf.get_tensor_name_map(_arch(family), config.num_hidden_layers)
    planned = [
        (stored, tensor_name(names, stored.name), _storage(stored, wanted))
        for stored in source.tensors.values()
    ]
    if stretched is not None:
        writer.add_tensor_info("rope_freqs.weight", stretched.shape, stretched.dtype,
                               stretched.nbytes)  # fmt: skip
    for stored, target, storage in planned:
        rows, columns = _matrix(stored.shape)
        width = _row_bytes(columns, storage)
        dtype = np.dtype(np.float16 if storage == _F16 else np.float32)
        if storage in (_F32, _F16):
            writer.add_tensor_info(target, stored.shape, dtype, rows * width)
        else:
            writer.add_tensor_info(
                target, (*stored.shape[:-1], width), np.dtype(np.uint8), rows * width,
                raw_dtype=storage,
            )  # fmt: skip
    with closing(writer):
        writer.write_header_to_file(path=file)
        with refused_by(merged):
            writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if stretched is not None:
            writer.write_tensor_data(stretched)
        for stored, _, storage in planned:
            writer.write_tensor_data(_encoded(stored, source, config, family, storage))
    types: dict[str, int] = {}
    for *_, storage in planned:
        types[storage.name] = types.get(storage.name, 0) + 1
    return GgufFigures(
        family.arch, splitter, len(planned), types, family.own_metadata and stretched is None
    )


def _check_sizes(config: Any, source: MappedCheckpoint) -> None:
    """Refuse a configuration of far more than the folder holds, before lists are made of it."""
    rows = max((stored.shape[0] for stored in source.tensors.values() if stored.shape), default=0)
    if not 0 < config.vocab_size <= rows:
        raise ValueError(f"vocab_size = {config.vocab_size}: no tensor has so many rows")
    if not 0 < config.num_hidden_layers <= len(source.tensors):
        raise ValueError(
            f"num_hidden_layers = {config.num_hidden_layers}: there are {len(source.tensors)} "
            "tensors"
        )


def _arch(family: Family) -> Any:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _storage(stored: StoredTensor, wanted: Any) -> Any:
    """The type a tensor is stored in."""
    if len(stored.shape) == 1:
        return _F32
    is_table = stored.name.endswith(("embed_tokens.weight", "lm_head.weight"))
    chosen = _Q8 if is_table and wanted not in (_F16, _Q8) else wanted
    if chosen != _F16 and stored.shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0]:
        return _F16  # its rows do not divide into quantization blocks
    return chosen


def _row_bytes(columns: int, storage: Any) -> int:
    block, size = gguf.GGML_QUANT_SIZES[storage]
    return int(columns // block * size)


def _encoded(
    stored: StoredTensor, source: MappedCheckpoint, config: Any, family: Family, storage: Any
) -> "np.ndarray[Any, Any]":
    """The tensor in its storage type; only this, and one block in float32, are in memory."""
    values = stored_rows(stored.name, source.view(stored), config, family)
    if values.dim() == 1:
        vector: np.ndarray[Any, Any] = values.float().numpy()
        return vector
    rows, columns = values.shape
    width = _row_bytes(columns, storage)
    result = np.empty((rows, width), dtype=np.uint8)
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        block = values[start : start + step].to(torch.float32).numpy()
        if storage == _F16 and (largest := float(np.abs(block).max())) > _LARGEST_F16:
            raise UserError(
                f"--format gguf: {stored.name} holds {largest:g}, beyond {_LARGEST_F16:g}, the "
                "largest of fp16; use --format merged --dtype bf16"
            )
        part = gguf.quants.quantize(block, storage)
        result[start : start + step] = part.view(np.uint8).reshape(len(block), width)
    return result.view(np.float16) if storage == _F16 else result
