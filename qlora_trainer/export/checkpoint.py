"""The base's tensors, read where they lie: a memory map a file, a view a tensor, nothing copied.

A safetensors file is eight bytes of header length, a JSON header, then the tensors back to back
(https://huggingface.co/docs/safetensors). `base` has checked all shards before one is mapped; the
headers are read here rather than by the library so that an unchanged tensor can be copied as bytes
and a changed one read block by block, at no memory of its own.

Checkpoints that bitsandbytes quantized hold, beside each packed weight, the parts of its
quantization state; such a weight appears as one tensor of its true shape.
"""

import json
import mmap
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qlora_trainer.base.checkpoint import open_checkpoint
from qlora_trainer.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        name: Its name in the checkpoint.
        shape: Its true shape, also where it is packed.
        dtype: Of its values; of what it unpacks to, where it is packed.
        file: The shard.
        start: First byte in the shard.
        stop: One past its last byte.
        parts: Of a packed weight, the parts of its quantization state.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int
    stop: int
    parts: dict[str, "StoredTensor"] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """Whether bitsandbytes has packed it in 4 bits."""
        return bool(self.parts)


class MappedCheckpoint:
    """All tensors of a folder's safetensors files, checked whole before any is read.

    Args:
        folder: A model folder.

    Attributes:
        tensors: By name, packed weights as one.

    Raises:
        UserError: The folder is not whole, or holds types an export cannot read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        headers = open_checkpoint(folder).tensors
        stored: dict[str, StoredTensor] = {}
        for file in sorted({header.file for header in headers.values()}):
            stored.update(read_header(folder / file))
        self._maps: dict[Path, mmap.mmap] = {}
        self.tensors = self._with_packed(stored)

    def close(self) -> None:
        """Forget the maps; views already handed out stay valid until they are dropped."""
        self._maps.clear()

    @cached_property
    def is_packed(self) -> bool:
        """Whether any weight is held in 4 bits only."""
        return any(tensor.packed for tensor in self.tensors.values())

    def raw_bytes(self, tensor: StoredTensor) -> memoryview:
        """The tensor's bytes, on the map."""
        return memoryview(self._map(tensor.file))[tensor.start : tensor.stop]

    def view(self, tensor: StoredTensor) -> Tensor:
        """The tensor as it is stored, on the map; a packed one as its codes."""
        if tensor.start == tensor.stop:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        if tensor.packed:
            return self.view(tensor.parts["codes"])
        flat = torch.frombuffer(
            self._map(tensor.file),
            dtype=tensor.dtype,
            offset=tensor.start,
            count=(tensor.stop - tensor.start) // tensor.dtype.itemsize,
        )
        return flat.view(tensor.shape)

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor's values: a view on the map, or what a packed weight stands for, in fp32."""
        if not tensor.packed:
            return self.view(tensor)
        state = {
            name: self.view(part).clone() for name, part in tensor.parts.items() if name != "codes"
        }
        quant_state = bnb.QuantState.from_dict(state, device=torch.device("cpu"))
        quant_state.dtype = torch.float32
        codes = self.view(tensor.parts["codes"]).clone().view(torch.uint8)
        dense: Tensor = bnb.dequantize_4bit(codes.view(-1, 1), quant_state)
        return dense.view(tensor.shape)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as opened:
                # A private map is writable in Python's eyes, which torch asks for; nobody writes.
                opened_map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            if hasattr(mmap, "MADV_SEQUENTIAL"):  # read ahead: not on Windows
                opened_map.madvise(mmap.MADV_SEQUENTIAL)
            self._maps[file] = opened_map
        return self._maps[file]

    def _with_packed(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Gather each packed weight and the parts of its state into one tensor."""
        whole = dict(stored)
        for state_name in [name for name in stored if _STATE in name]:
            name = state_name.partition(_STATE)[0]
            parts = {key: t for key, t in stored.items() if key.startswith(f"{name}.")}
            for key in parts:
                whole.pop(key, None)
            codes = stored[name]
            meta = json.loads(bytes(self.raw_bytes(stored[state_name])))
            whole[name] = StoredTensor(
                name, tuple(meta["shape"]), torch.float32, codes.file, codes.start, codes.stop,
                {**parts, "codes": codes},
            )  # fmt: skip
        return whole


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read one safetensors header that is known to be whole."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    faults = [
        f"{file.name}: {name} is of type {entry['dtype']}, which an export cannot read"
        for name, entry in header.items()
        if entry["dtype"] not in DTYPES
    ]
    if faults:
        raise UserError.from_faults(f"{file.parent}: take the model's 16-bit release", faults)
    return {
        name: StoredTensor(
            name, tuple(entry["shape"]), DTYPES[entry["dtype"]], file,
            *(8 + length + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
    }  # fmt: skip
