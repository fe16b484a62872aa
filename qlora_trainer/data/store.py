"""Encoded rows on disk: one Arrow stream, memory-mapped, written whole or not at all.

A folder per data set, named by the hash of everything that decides its content:

    rows.arrow   input_ids, trained (flat start, end, start, end ...), where, source, hash,
                 reference (JSON), file, and the columns a task declares
    meta.json    counts, fingerprint, size of rows.arrow

It is written beside its place and renamed into it, so a reader sees a whole one or none. The
trained ranges stand in for labels: two numbers per turn instead of one per token.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qlora_trainer.data.encode import Example
from qlora_trainer.errors import UserError

STORE_VERSION = 3
ROWS_PER_BATCH = 1024
_ABANDONED_SECONDS = 3600
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.int32())),
        ("where", pa.string()),
        ("source", pa.int16()),
        ("hash", pa.uint64()),
        ("reference", pa.string()),
        ("file", pa.string()),
    ]
)
_KINDS = {"int32": pa.int32(), "float32": pa.float32(), "uint8": pa.uint8()}


def schema_with(columns: Mapping[str, str]) -> pa.Schema:
    """The schema with a task's own columns: name -> numpy dtype."""
    fields = [pa.field(name, pa.list_(_KINDS[kind])) for name, kind in columns.items()]
    return pa.schema([*SCHEMA, *fields])


class StoreWriter:
    """Writes a store into `folder`; leaving the `with` block by an exception leaves nothing.

    Raises:
        UserError: On entering and adding: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path, columns: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.count = 0
        self._own = dict(columns or {})
        self._schema = schema_with(self._own)
        self._digest = hashlib.sha256()
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}

    def __enter__(self) -> "StoreWriter":
        with _writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.folder.parent, self.folder.name)
            self._work = Path(
                tempfile.mkdtemp(prefix=f".{self.folder.name[:16]}.", dir=self.folder.parent)
            )
            self._file = pa.OSFile(str(self._work / "rows.arrow"), "wb")
            self._stream = pa.ipc.new_stream(self._file, self._schema)
        return self

    def add(self, example: Example, where: str, source: int) -> None:
        """Append one example."""
        ids = np.asarray(example.input_ids, np.int32)
        trained = np.asarray(example.trained, np.int32).reshape(-1)
        content = ids.tobytes() + b"|" + trained.tobytes()
        own = [np.asarray(example.columns[name], kind) for name, kind in self._own.items()]
        for name, values in zip(self._own, own, strict=True):
            content += f"|{name}|".encode() + values.tobytes()
        reference = None
        if example.reference is not None:
            reference = json.dumps(example.reference, sort_keys=True)
            content += b"|" + reference.encode()
        row_digest = hashlib.sha256(content).digest()
        self._digest.update(row_digest)
        number = int.from_bytes(row_digest[:8], "little")
        row = (ids, trained, where, source, number, reference, example.file, *own)
        for name, value in zip(self._schema.names, row, strict=True):
            self._columns[name].append(value)
        self.count += 1
        if len(self._columns["where"]) == ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._columns["where"]:
            with _writing(self.folder):
                batch = pa.RecordBatch.from_pydict(self._columns, schema=self._schema)
                self._stream.write_batch(batch)
        self._columns = {name: [] for name in self._schema.names}

    def finish(self, counts: dict[str, Any]) -> None:
        """Write what is left and `meta.json`, and put the store in its place.

        Raises:
            UserError: The disk is full, or the folder cannot be written.
        """
        self._flush()
        with _writing(self.folder):
            self._finish(counts)

    def _finish(self, counts: dict[str, Any]) -> None:
        self._stream.close()
        self._file.close()
        rows = self._work / "rows.arrow"
        meta = {
            "version": STORE_VERSION,
            "fingerprint": self._digest.hexdigest(),
            "rows": self.count,
            "rows_arrow_bytes": rows.stat().st_size,
            **counts,
        }
        (self._work / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in (rows, self._work / "meta.json"):
            with path.open("rb+") as handle:
                os.fsync(handle.fileno())
        if self.folder.exists() and read_meta(self.folder) is None:
            shutil.rmtree(self.folder)  # a broken one, from before or from outside
        with contextlib.suppress(OSError):  # another process was first with the same content
            self._work.rename(self.folder)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError, pa.ArrowInvalid):
            self._stream.close()
        self._file.close()
        shutil.rmtree(self._work, ignore_errors=True)


def _remove_abandoned(parent: Path, name: str) -> None:
    """Remove what killed writers of this store left; one at work has written within the hour."""
    for work in parent.glob(f".{name[:16]}.*"):
        rows = work / "rows.arrow"
        if rows.exists() and time.time() - rows.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Tell what the system refuses while a store is written as the user's to mend."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"the encoded data cannot be kept in {folder.parent} ({reason}); make room, or name "
            "another folder: data.cache_folder"
        ) from error


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The meta data of a whole store, or None if there is none or it is damaged."""
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        whole = (folder / "rows.arrow").stat().st_size == meta["rows_arrow_bytes"]
    except (OSError, ValueError, KeyError):
        return None
    return meta if whole and meta.get("version") == STORE_VERSION else None


class Store:
    """Random access to a store; pages come and go with the operating system's cache.

    Attributes:
        meta: Content of `meta.json`.
        lengths: (N,) Tokens of every row.
        trained_counts: (N,) Trained tokens of every row.
        hashes: (N,) 64 bits of each row's SHA-256.
        sources: (N,) Index of each row's source.
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = folder, meta
        self._map = pa.memory_map(str(folder / "rows.arrow"))
        batches = list(pa.ipc.open_stream(self._map))
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._batches = batches
        self._ids = [_flat(batch["input_ids"]) for batch in batches]
        self._trained = [_flat(batch["trained"]) for batch in batches]
        self._own: dict[str, list[tuple[_Array, _Array]]] = {}  # as they are asked for
        self.lengths = _joined([np.diff(offsets) for offsets, _ in self._ids], np.int64)
        self.trained_counts = _joined([_range_sums(*flat) for flat in self._trained], np.int64)
        self.hashes = _joined([batch["hash"].to_numpy() for batch in batches], np.uint64)
        self.sources = _joined([batch["source"].to_numpy() for batch in batches], np.int16)

    @cached_property
    def origins(self) -> "np.ndarray[Any, np.dtype[np.uint64]]":
        """(N,) Hash of the first row that came from the same record: windows of it share one."""
        fresh, before = [np.zeros(0, bool)], (None, -1)
        for batch in self._batches:
            where, source = batch["where"], batch["source"].to_numpy()
            same = pc.equal(where.slice(1), where.slice(0, len(where) - 1))
            new = ~same.to_numpy(zero_copy_only=False) | (np.diff(source) != 0)
            first = (where[0].as_py(), int(source[0])) != before
            fresh += [np.array([first]), new]
            before = (where[-1].as_py(), int(source[-1]))
        starts = np.flatnonzero(np.concatenate(fresh))
        counts = np.diff([*starts, len(self)])
        return np.repeat(self.hashes[starts], counts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return batch, row - int(self._starts[batch])

    def input_ids(self, row: int) -> "np.ndarray[Any, np.dtype[np.int32]]":
        """(T,) The row's tokens, a view into the mapped file."""
        batch, index = self._find(row)
        offsets, values = self._ids[batch]
        return values[offsets[index] : offsets[index + 1]]

    def trained(self, row: int) -> list[tuple[int, int]]:
        """The row's trained position ranges."""
        batch, index = self._find(row)
        offsets, values = self._trained[batch]
        flat = values[offsets[index] : offsets[index + 1]].tolist()
        return list(zip(flat[::2], flat[1::2], strict=True))

    def column(self, row: int, name: str) -> "np.ndarray[Any, np.dtype[Any]]":
        """The row's values in a task's own column, a view into the mapped file."""
        batch, index = self._find(row)
        if name not in self._own:
            self._own[name] = [_flat(part[name]) for part in self._batches]
        offsets, values = self._own[name][batch]
        return values[offsets[index] : offsets[index + 1]]

    def reference(self, row: int) -> Any:
        """The row's reference."""
        batch, index = self._find(row)
        text = self._batches[batch]["reference"][index].as_py()
        return None if text is None else json.loads(text)

    def where(self, row: int) -> str:
        """File and line, or data set and row, the row came from."""
        batch, index = self._find(row)
        return str(self._batches[batch]["where"][index])

    def file(self, row: int) -> str:
        """Where the rest of the row lies (a picture)."""
        batch, index = self._find(row)
        return str(self._batches[batch]["file"][index])

    def rows(self) -> Iterator[int]:
        """All row numbers."""
        return iter(range(len(self)))


_Array = np.ndarray[Any, np.dtype[Any]]


def _flat(column: Any) -> tuple[_Array, _Array]:
    """Offsets and values of a list column, without copying the values."""
    return column.offsets.to_numpy(), column.values.to_numpy()


def _joined(parts: list[_Array], dtype: Any) -> _Array:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _range_sums(offsets: _Array, values: _Array) -> _Array:
    """Sum of `end - start` per row, from flat (start, end) pairs."""
    sizes = values[1::2] - values[::2]
    total = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    sums: _Array = np.diff(total[offsets // 2])
    return sums
