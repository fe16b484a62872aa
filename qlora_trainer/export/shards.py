"""Writing safetensors shards whose tensors never exist whole in memory.

Names, dtypes and shapes are known before the first value is, so every tensor has its place in a
shard from the start: headers are written first, and values go to their places as they are made, in
any order and from any thread. Bytes are counted: a shard of which some are missing is an error, so
one whose writer was closed is whole. A full shard is forced to disk on a thread of its own while
the next ones are written.
"""

import contextlib
import json
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.checkpoint import INDEX_FILE, SINGLE_FILE
from qlora_trainer.export.checkpoint import DTYPE_CODES

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Announced:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass
class _Shard:
    """One file, and how much of each of its tensors is still to be written."""

    name: str
    file: FileIO
    missing: dict[str, int] = field(default_factory=dict)  # name -> bytes
    missing_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class ShardWriter:
    """Writes announced tensors into one or more shards; use it as a context manager.

    Args:
        folder: Where the shards go.
        tensors: Everything that will be written, in the order it has in the files.
        max_shard_bytes: A shard takes tensors until the next would pass this; one always.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[Announced], max_shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        self.folder = folder
        self._divided = _divide(tensors, max_shard_bytes)
        self._shards: list[_Shard] = []
        self._places: dict[str, tuple[_Shard, int]] = {}  # name -> its shard, its first byte there
        self._syncing = ThreadPoolExecutor(max_workers=1)
        self._synced: list[Future[None]] = []

    def __enter__(self) -> "ShardWriter":
        try:
            for name, tensors in zip(_shard_names(len(self._divided)), self._divided, strict=True):
                self._start(name, tensors)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._release()

    def write(self, name: str, offset_bytes: int, values: torch.Tensor | memoryview) -> None:
        """Write some values of a tensor to their place; any thread may.

        Args:
            name: Of the tensor.
            offset_bytes: Bytes of the tensor that come before these.
            values: In the announced dtype, or bytes. Each byte of a tensor is written once.

        Raises:
            OSError: The disk is full, or failed.
        """
        if isinstance(values, torch.Tensor):
            if values.numel() == 0:
                return
            flat: Any = values.contiguous().view(-1).view(torch.uint8).numpy()
            values = memoryview(flat)
        shard, start = self._places[name]
        with shard.lock:
            shard.file.seek(start + offset_bytes)
            _write_all(shard.file, values)
            shard.missing[name] -= len(values)
            shard.missing_bytes -= len(values)
            if shard.missing_bytes == 0:
                self._synced.append(self._syncing.submit(os.fsync, shard.file.fileno()))

    def _start(self, name: str, tensors: Sequence[Announced]) -> None:
        """Open a shard and write its header; its tensors have their places then."""
        shard = _Shard(name, (self.folder / name).open("wb", buffering=0))
        self._shards.append(shard)
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for tensor in tensors:
            first = shard.missing_bytes
            shard.missing[tensor.name] = tensor.size_bytes
            shard.missing_bytes += tensor.size_bytes
            entries[tensor.name] = {
                "dtype": DTYPE_CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [first, shard.missing_bytes],
            }
            self._places[tensor.name] = (shard, first)
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        _write_all(shard.file, memoryview(header))
        for tensor in tensors:
            self._places[tensor.name] = (shard, len(header) + self._places[tensor.name][1])

    def _finish(self) -> None:
        """Wait for the disk and write the index.

        Raises:
            ValueError: Something announced has not been written, or something twice.
            OSError: The disk is full, or failed.
        """
        for shard in self._shards:
            for name, count in shard.missing.items():
                if count:
                    raise ValueError(f"{name!r}: {count} bytes are missing")
        for synced in self._synced:
            synced.result()
        if len(self._shards) > 1:
            self._write_index()

    def _release(self) -> None:
        self._syncing.shutdown(cancel_futures=True)
        with contextlib.ExitStack() as closing:  # all of them, also where one fails
            for shard in self._shards:
                closing.callback(shard.file.close)

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_size": sum(t.size_bytes for part in self._divided for t in part)},
            "weight_map": {name: shard.name for shard in self._shards for name in shard.missing},
        }
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_all(file: FileIO, values: memoryview) -> None:
    """Unbuffered files may take less than they are given."""
    while len(values):
        values = values[file.write(values) :]


def _divide(tensors: Sequence[Announced], max_shard_bytes: int) -> list[list[Announced]]:
    shards: list[list[Announced]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size_bytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
