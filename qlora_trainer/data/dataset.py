"""Sources to one encoded data set on disk: read, shape, encode, fit to length, store.

Rows stream through in small batches, so memory does not grow with the data. The result is cached
under a hash of the sources' content, the tokenizer and the settings; the same run finds it again.

A source's weight decides how often its rows are used: 2 lists each row twice, 0.5 lists half of
them (chosen by hash, the same half every time). Nothing is encoded or stored twice for it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from qlora_trainer.data.encode import IGNORED
from qlora_trainer.data.length import OVER_LENGTH, LengthPolicy
from qlora_trainer.data.order import hash_order, mix
from qlora_trainer.data.pipeline import encode_into
from qlora_trainer.data.read import DataSource, OpenedSource, open_source
from qlora_trainer.data.rows import RecordEncoder
from qlora_trainer.data.store import Store, read_meta
from qlora_trainer.errors import UserError

_Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class EncodedDataset:
    """Examples in random access; `rows` lists the stored rows in use, repeats included.

    Attributes:
        store: The rows on disk.
        rows: (N,) Index into the store for each of our examples.
        source_paths: The sources, by the index the store keeps.
    """

    store: Store
    rows: _Array
    source_paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> _Array:
        """(N,) Tokens of every example."""
        lengths: _Array = self.store.lengths[self.rows]
        return lengths

    @cached_property
    def trained_counts(self) -> _Array:
        """(N,) Trained tokens of every example."""
        counts: _Array = self.store.trained_counts[self.rows]
        return counts

    @cached_property
    def hashes(self) -> _Array:
        """(N,) 64-bit content hash of every example."""
        hashes: _Array = self.store.hashes[self.rows]
        return hashes

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the encoded rows and of which of them are used."""
        whole = hashlib.sha256(self.store.meta["fingerprint"].encode())
        whole.update(self.rows.astype("<i8").tobytes())
        return whole.hexdigest()

    @property
    def counts(self) -> dict[str, Any]:
        """What encoding counted: rows read, truncated, dropped, cut answers, split chats ..."""
        return dict(self.store.meta)

    def input_ids(self, index: int) -> _Array:
        """(T,) int32, a view into the mapped file."""
        return self.store.input_ids(int(self.rows[index]))

    def trained(self, index: int) -> list[tuple[int, int]]:
        """Trained position ranges of an example."""
        return self.store.trained(int(self.rows[index]))

    def labels(self, index: int) -> _Array:
        """(T,) int64: the token at trained positions, else -100; aligned with `input_ids`."""
        ids = self.input_ids(index)
        labels = np.full(len(ids), IGNORED, np.int64)
        for start, end in self.trained(index):
            labels[start:end] = ids[start:end]
        return labels

    def column(self, index: int, name: str) -> _Array:
        """An example's values in a column its task declares."""
        return self.store.column(int(self.rows[index]), name)

    def reference(self, index: int) -> Any:
        """What a prediction for an example is scored against."""
        return self.store.reference(int(self.rows[index]))

    def where(self, index: int) -> str:
        """File and line, or data set and row, an example came from."""
        return self.store.where(int(self.rows[index]))

    def file(self, index: int) -> str:
        """Where the rest of an example lies (a picture)."""
        return self.store.file(int(self.rows[index]))

    def select(self, indices: _Array | Sequence[int]) -> "EncodedDataset":
        """These examples, in this order."""
        chosen = self.rows[np.asarray(indices, np.int64)]
        return EncodedDataset(self.store, chosen, self.source_paths)


def build_dataset(
    sources: Sequence[DataSource],
    encoder: RecordEncoder,
    *,
    max_seq_len: int,
    over_length: str = "raise",
    cache_dir: Path,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> EncodedDataset:
    """Encode sources, or find them encoded.

    Args:
        sources: Where the rows are.
        encoder: Makes examples of rows.
        max_seq_len: Most tokens an example may have.
        over_length: What to do with longer ones: `raise`, `truncate` (the end is cut) or `drop`.
        cache_dir: Folder the encoded rows are kept in.
        seed: Decides which rows a fractional weight takes.
        progress: Called with the number of rows read so far.

    Raises:
        UserError: All faults of all sources in one message. Nothing is stored then.
    """
    if over_length not in OVER_LENGTH:
        known = ", ".join(OVER_LENGTH)
        raise UserError(f"data.over_length = {over_length!r}: must be one of {known}")
    if max_seq_len < 2:
        raise UserError(
            f"data.max_seq_len = {max_seq_len}: must be at least 2 to hold a trained token"
        )
    if not sources:
        raise UserError("no data source is given; name at least one file, folder or data set")
    opened = [open_source(source) for source in sources]
    key = _cache_key(opened, encoder, max_seq_len, over_length)
    folder = Path(cache_dir) / key[:32]
    meta = read_meta(folder)
    if meta is None:
        encode_into(folder, opened, encoder, LengthPolicy(max_seq_len, over_length), progress)
        meta = read_meta(folder)
    if meta is None:
        raise UserError(
            f"the encoded data could not be kept in {folder}: delete it, or name another folder: "
            "data.cache_folder"
        )
    store = Store(folder, meta)
    weights = [source.weight for source in sources]
    paths = tuple(source.path for source in sources)
    return EncodedDataset(store, _weighted_rows(store, weights, seed), paths)


def split_eval(
    dataset: EncodedDataset, fraction: float, seed: int = 0
) -> tuple[EncodedDataset, EncodedDataset]:
    """Hold out a fraction of the distinct rows, the same ones every time.

    Records are chosen by the hash of the first row they became, so all rows of a record (windows of
    a long text, answers of a chat) fall on the same side, and so do records that begin with equal
    rows. Given up: a later row of one record may equal a row of another on the other side.

    Returns:
        Training and evaluation part; the latter uses each row once, whatever its weight.

    Raises:
        UserError: The fraction is not between 0 and 1, or leaves one side empty.
    """
    if not 0 < fraction < 1:
        raise UserError(f"data.eval_fraction = {fraction}: must be above 0 and below 1")
    origins = dataset.store.origins[dataset.rows]
    distinct = np.unique(origins)
    held_count = max(1, round(len(distinct) * fraction))
    if held_count >= len(distinct):
        raise UserError(
            f"data.eval_fraction = {fraction}: {len(distinct)} distinct rows leave none to train "
            "on; "
            "give more rows or a source of its own for evaluation"
        )
    held = distinct[np.argsort(mix(distinct, seed), kind="stable")[:held_count]]
    is_held = np.isin(origins, held)
    eval_rows = np.unique(dataset.rows[is_held])
    train = EncodedDataset(dataset.store, dataset.rows[~is_held], dataset.source_paths)
    return train, EncodedDataset(dataset.store, eval_rows, dataset.source_paths)


def _cache_key(
    opened: Sequence[OpenedSource], encoder: RecordEncoder, max_seq_len: int, over_length: str
) -> str:
    parts = {
        "sources": [
            [item.identity, item.source.format, dict(item.source.columns), item.source.path]
            for item in opened
        ],
        "encoder": encoder.identity,
        "max_seq_len": max_seq_len,
        "over_length": over_length,
        "code": _code_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1)
def _code_hash() -> str:
    """Hash of this room's own code: rows encoded by other code are not the same rows."""
    whole = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def _weighted_rows(store: Store, weights: Sequence[float], seed: int) -> _Array:
    """Store rows in use: each source's rows `weight` times, the fraction chosen by hash."""
    parts: list[_Array] = []
    for source, weight in enumerate(weights):
        rows = np.flatnonzero(store.sources == source)
        whole = int(weight)
        count = (
            max(1, round(len(rows) * (weight - whole)))
            if weight < 1
            else round(len(rows) * (weight - whole))
        )
        parts += [rows] * whole
        if count and len(rows):
            parts.append(np.sort(rows[hash_order(len(rows), seed, source)[:count]]))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
