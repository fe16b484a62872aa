"""Safetensors headers and indexes as strangers may have written them: believed nowhere.

An index names files below its own folder, and safetensors only. A header places every tensor
inside its file, in as many bytes as its type and shape take, so that nobody who maps the file by
it reads past the end.
"""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_trainer.units import format_bytes

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# No part begins with a dot, so none is `..`; no pattern's sign (`*`), no backslash, no drive.
_SHARD_NAME = re.compile(r"(?:[\w+= -][\w+= .-]*/)*[\w+= -][\w+= .-]*\.safetensors")
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """What a shard's header says of one tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def strange_shards(weight_map: Mapping[str, Any]) -> list[str]:
    """What an index names that is no safetensors file below its folder, one fault for each.

    >>> strange_shards({"a": "model-1.safetensors", "b": "../model.safetensors"})
    ["names '../model.safetensors', which is no safetensors file in its folder; take the model's \
own release"]
    """
    values = dict.fromkeys(str(shard) for shard in weight_map.values())
    return [
        f"names {shard!r}, which is no safetensors file in its folder; take the model's own release"
        for shard in values
        if not _SHARD_NAME.fullmatch(shard)
    ]


def check_header(path: Path, faults: list[str]) -> dict[str, TensorHeader] | None:
    """The tensors a shard holds, or None and a fault when it is not a whole safetensors file."""
    way_out = "fetch it again (a download resumes)"
    if not path.is_file():
        faults.append(f"{path.name} is missing; {way_out}")
        return None
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(size_bytes - 8, _MAX_HEADER_BYTES):
            kind = "is empty" if size_bytes == 0 else "has no safetensors header"
            text = start + file.read(200)
            if text.startswith(b"version https://git-lfs"):
                kind, way_out = "is only a Git LFS pointer", "run `git lfs pull` in the folder"
            faults.append(f"{path.name} {kind} ({size_bytes} bytes); {way_out}")
            return None
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _tensor_header(path.name, entry) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        faults.append(f"{path.name} has a broken safetensors header; {way_out}")
        return None
    if 8 + length + end != size_bytes:
        faults.append(
            f"{path.name} has {format_bytes(size_bytes)} ({size_bytes} bytes) where its header "
            f"says {format_bytes(8 + length + end)} ({8 + length + end} bytes); {way_out}"
        )
        return None
    return tensors


def _tensor_header(file: str, entry: dict[str, Any]) -> TensorHeader:
    """One tensor of a header.

    Raises:
        ValueError: Its bytes are not those of its shape (KeyError and TypeError for worse).
    """
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise TypeError(dtype, shape)
    if not all(type(number) is int and number >= 0 for number in (start, *shape)):
        raise ValueError(start, shape)
    bits = _BITS.get(dtype)
    if type(stop) is not int or stop < start:
        raise ValueError(start, stop)
    if bits is not None and 8 * (stop - start) != bits * math.prod(shape):
        raise ValueError(dtype, shape, start, stop)
    return TensorHeader(file, dtype, tuple(shape), stop - start)
