"""Writing safetensors shards whose tensors never exist whole in memory.

Names, dtypes and shapes are known before the first value is, so a shard's header is written first
and the values follow as they are made, block by block. Tensors come in the order they were
announced; a tensor that gets too few or too many bytes is an error, so a shard whose writer was
closed is whole. Writing happens on a thread of its own while the next values are computed, forcing
a full shard to disk on another while the next one is written; at most a few batches wait.
"""

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qlora_trainer.base.checkpoint import INDEX_FILE, SINGLE_FILE
from qlora_trainer.export.checkpoint import DTYPE_CODES

DEFAULT_SHARD_BYTES = 5 * 10**9
_BATCH_BYTES = 4 * 2**20  # handed to the writing thread at one time
_MOST_WAITING = 4


@dataclass(frozen=True)
class Announced:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


class ShardWriter:
    """Writes announced tensors into one or more shards; use it as a context manager.

    Args:
        folder: Where the shards go.
        tensors: Everything that will be written, in order.
        max_shard_bytes: A shard takes tensors until the next would pass this; one always.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[Announced], max_shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        self.folder = folder
        self._shards = _divide(tensors, max_shard_bytes)
        self._names = _shard_names(len(self._shards))
        self._at = -1
        self._file: BinaryIO | None = None
        self._open: Announced | None = None
        self._left = 0
        self._waiting: list[Announced] = []
        self._batch: list[memoryview] = []
        self._batch_bytes = 0
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._syncing = ThreadPoolExecutor(max_workers=1)
        self._running: deque[Future[object]] = deque()
        self._full: list[BinaryIO] = []
        self._synced: deque[Future[object]] = deque()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._syncing.shutdown(cancel_futures=True)
            with contextlib.ExitStack() as closing:  # all of them, also where one fails
                for file in (*self._full, *([self._file] if self._file is not None else [])):
                    closing.callback(file.close)

    def begin(self, name: str) -> None:
        """Start the next tensor, which must be the next announced one."""
        self._end()
        while not self._waiting:
            self._next_shard()
        self._open = self._waiting.pop(0)
        if self._open.name != name:
            raise ValueError(f"{name!r} was begun, {self._open.name!r} was announced")
        self._left = self._open.size_bytes

    def write(self, values: torch.Tensor | memoryview) -> None:
        """Append values (in the announced dtype) or bytes to the tensor that was begun."""
        if isinstance(values, torch.Tensor):
            if values.numel() == 0:
                return
            flat: Any = values.contiguous().view(-1).view(torch.uint8).numpy()
            values = memoryview(flat)
        self._left -= values.nbytes
        self._batch.append(values)
        self._batch_bytes += values.nbytes
        if self._batch_bytes >= _BATCH_BYTES:
            self._hand_over()

    def close(self) -> None:
        """Finish the last shard and write the index.

        Raises:
            ValueError: Something announced has not been written.
            OSError: The disk is full, or failed.
        """
        self._end()
        if self._waiting or self._at + 1 < len(self._shards):
            raise ValueError("not every announced tensor was written")
        self._finish_shard()
        while self._running:
            self._running.popleft().result()
        while self._synced:
            self._synced.popleft().result()
        if len(self._shards) > 1:
            self._write_index()

    def _end(self) -> None:
        if self._open is not None and self._left:
            raise ValueError(f"{self._open.name!r}: {self._left} bytes are missing")
        self._open = None

    def _next_shard(self) -> None:
        self._finish_shard()
        self._at += 1
        self._waiting = list(self._shards[self._at])
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self._waiting:
            stop = offset + tensor.size_bytes
            header[tensor.name] = {
                "dtype": DTYPE_CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, stop],
            }
            offset = stop
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self.folder / self._names[self._at]).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _finish_shard(self) -> None:
        if self._file is not None:
            self._hand_over()
            self._full.append(self._file)
            self._run(self._force_to_disk, self._file)
            self._file = None

    def _force_to_disk(self, file: BinaryIO) -> None:
        file.flush()
        self._synced.append(self._syncing.submit(_sync, file))

    def _hand_over(self) -> None:
        """Give what has gathered to the writing thread."""
        assert self._file is not None
        self._run(self._file.writelines, self._batch)
        self._batch, self._batch_bytes = [], 0

    def _run(self, work: Callable[..., object], *args: object) -> None:
        """Queue work behind what is waiting; an earlier failure is raised here."""
        self._running.append(self._thread.submit(work, *args))
        while len(self._running) > _MOST_WAITING:
            self._running.popleft().result()

    def _write_index(self) -> None:
        pairs = list(zip(self._names, self._shards, strict=True))
        index = {
            "metadata": {"total_size": sum(t.size_bytes for _, shard in pairs for t in shard)},
            "weight_map": {tensor.name: name for name, shard in pairs for tensor in shard},
        }
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _sync(file: BinaryIO) -> None:
    os.fsync(file.fileno())
    file.close()


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
