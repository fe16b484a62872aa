"""A source of rows: which files or data set it names, and its rows with their provenance.

A path may be a file, a pattern (`data/*.jsonl`), a folder of such files, a folder written by
`datasets.save_to_disk`, or the name of a data set on the Hugging Face hub. Local files are parsed
in `files.py`; the last two are read through `datasets`.
"""

import difflib
import glob
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_trainer.base.checksums import sha256_of_file
from qlora_trainer.base.hub_failures import TRANSFER_FAILURES
from qlora_trainer.data.faults import Fault, FaultLog
from qlora_trainer.data.files import READERS, file_type, read_file, without_nulls
from qlora_trainer.data.hub_faults import explain_data_error
from qlora_trainer.data.picture_files import is_picture, named_picture, picture_files
from qlora_trainer.data.text_lines import Row
from qlora_trainer.errors import UserError

_KNOWN = ", ".join(READERS)
# Words that mean one split in file names (datasets, `data_files.SPLIT_KEYWORDS`).
_SPLIT_WORDS = (
    ("train", "training"),
    ("validation", "valid", "dev", "val"),
    ("test", "testing", "eval", "evaluation"),
)


@dataclass(frozen=True)
class DataSource:
    """One source of rows, as the run file gives it.

    Attributes:
        path: File, pattern, folder or hub name.
        format: `auto`, or one of `formats.FORMATS`.
        split: Split of a folder or data set; `train` where there is one.
        name: Configuration of a hub data set.
        weight: How often each row is used per epoch: 2 uses every row twice, 0.5 every second one.
        columns: Our field name -> the column that holds it (`{"prompt": "question"}`).
        revision: Branch, tag or commit of a hub data set.
    """

    path: str
    format: str = "auto"
    split: str | None = None
    name: str | None = None
    weight: float = 1.0
    columns: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None


@dataclass(frozen=True)
class OpenedSource:
    """A source whose files or data set were found; rows are read on demand.

    `identity` is a hash of the content, the same wherever the files lie.
    """

    source: DataSource
    files: tuple[Path, ...]
    table: Any  # datasets.Dataset | None
    identity: str

    def rows(self, faults: FaultLog) -> Iterator[Row]:
        """Stream the rows; what cannot be read goes to `faults`."""
        if self.table is not None:
            for number, record in enumerate(self.table, 1):
                yield Row(without_nulls(record), f"{self.source.path} row {number}")
        for path in self.files:
            if is_picture(path):
                yield Row({"image": str(path), "label": path.parent.name}, str(path))
                continue
            column = self.source.columns.get("image", "image")
            for row in read_file(path, faults):
                yield Row(named_picture(row.record, column, path.parent), row.where)


def open_source(source: DataSource) -> OpenedSource:
    """Find what a source names.

    Raises:
        UserError: Nothing is there, it is of no known type, or its weight is not positive.
    """
    if not source.weight > 0 or source.weight == float("inf"):
        raise UserError(
            f"weight = {source.weight} of data source {source.path}: must be a positive number "
            "(2 uses every row twice per epoch, 0.5 every second row)"
        )
    path = Path(source.path).expanduser()
    if path.is_dir() and any(
        (path / marker).is_file() for marker in ("dataset_dict.json", "state.json")
    ):
        return _opened_table(source, _load_saved(source, path))
    if path.is_dir():
        return _opened_files(source, _folder_files(source, path))
    if path.is_file():
        return _opened_files(source, (path,))
    if glob.has_magic(source.path):
        matches = tuple(Path(name) for name in sorted(glob.glob(str(path), recursive=True)))
        if not matches:
            raise UserError(f"data source {source.path}: no file matches this pattern")
        return _opened_files(source, matches)
    if _looks_local(source.path):
        raise UserError(_not_found(path))
    return _opened_table(source, _load_hub(source))


def _looks_local(path: str) -> bool:
    if path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1:
        return True
    if Path(path).suffix.lower() in {*READERS, ".gz"}:
        return True
    return "/" in path and Path(path).parent.is_dir()


def _not_found(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"data source {path}: there is no folder {parent}; mend the path"
    names = sorted(item.name for item in parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"did you mean {parent / near[0]}?" if near else "mend the path"
    return f"data source {path}: no such file; {hint}"


def _folder_files(source: DataSource, folder: Path) -> tuple[Path, ...]:
    found = sorted(item for item in folder.rglob("*") if item.is_file() and file_type(item))
    if not found:
        if pictures := picture_files(folder, source.split):
            return pictures
        raise UserError(
            f"data source {folder}: the folder holds no file of type {_KNOWN}, and no pictures in "
            f"folders of their labels{f' (split {source.split!r})' if source.split else ''}"
        )

    def of(split: str) -> list[Path]:
        return [item for item in found if _names_split(item.relative_to(folder), split)]

    if source.split is None:
        return tuple(of("train") or found)
    matches = of(source.split.lower())
    if not matches:
        names = ", ".join(item.name for item in found[:10])
        raise UserError(
            f"data source {folder}: split {source.split!r} is empty: no file's path names it; "
            f"the folder has {names}"
        )
    return tuple(matches)


def _names_split(path: Path, split: str) -> bool:
    """Whether a folder's or the file's name has the split as a word, as `datasets` reads names.

    >>> _names_split(Path("data/train-00000.jsonl"), "train")
    True
    >>> _names_split(Path("constrained.jsonl"), "train")
    False
    """
    words = next((group for group in _SPLIT_WORDS if split in group), (split,))
    pattern = rf"(?:^|[-._ 0-9/])(?:{'|'.join(map(re.escape, words))})(?:[-._ 0-9/]|$)"
    return re.search(pattern, path.as_posix().lower()) is not None


def _opened_files(source: DataSource, files: tuple[Path, ...]) -> OpenedSource:
    unknown = [str(path) for path in files if file_type(path) is None and not is_picture(path)]
    if unknown:
        raise UserError(
            f"data source {source.path}: {', '.join(unknown[:5])} is of no known type; "
            f"known are {_KNOWN}, and all but Parquet also with .gz"
        )
    return OpenedSource(source, files, None, _hash_files(files))


def _opened_table(source: DataSource, table: Any) -> OpenedSource:
    parts = tuple(Path(part["filename"]) for part in table.cache_files)
    indices = getattr(table, "_indices", None) is not None
    identity = table._fingerprint if indices or not parts else _hash_files(parts)
    return OpenedSource(source, (), table, identity)


def _hash_files(files: tuple[Path, ...]) -> str:
    """SHA-256 over the files' contents in order; about a second per gigabyte."""
    whole = hashlib.sha256()
    for path in files:
        try:
            whole.update(bytes.fromhex(sha256_of_file(path)))
        except OSError as error:
            raise UserError(f"data source {path}: cannot be read ({error.strerror})") from error
    return whole.hexdigest()


def _pick_split(source: DataSource, table: Any) -> Any:
    """One split of a `DatasetDict`; the table itself if it has none."""
    if not hasattr(table, "keys"):
        return table
    names = list(table.keys())
    wanted = source.split or (
        "train" if "train" in names else names[0] if len(names) == 1 else None
    )
    if wanted not in names:
        raise UserError(
            f"data source {source.path}: "
            + (f"no split {wanted!r}" if wanted else "several splits and none was chosen")
            + f"; set `split` to one of {', '.join(names)}"
        )
    return table[wanted]


def _load_saved(source: DataSource, folder: Path) -> Any:
    import datasets

    try:
        return _pick_split(source, datasets.load_from_disk(str(folder)))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"data source {folder}: not a whole `save_to_disk` folder ({error}); save it again"
        ) from error


def _load_hub(source: DataSource) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(source.path, source.name, revision=source.revision)
    except (DatasetsError, *TRANSFER_FAILURES, ValueError) as error:
        raise UserError(f"data source {source.path}: {explain_data_error(error)}") from error
    return _pick_split(source, table)


def no_rows(opened: OpenedSource) -> Fault:
    """The fault of a source without a single row."""
    split = f" (split {opened.source.split})" if opened.source.split else ""
    return Fault(f"{opened.source.path}{split}", "holds no rows", "give a file or split with rows")
