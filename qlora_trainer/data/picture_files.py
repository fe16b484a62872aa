"""Files that are pictures: in folders named by their labels, or named by records.

    DIR/cat/1.png                    label cat
    DIR/train/cat/1.png              the same in a split

Nothing is opened here.
"""

from pathlib import Path
from typing import Any

SUFFIXES = (".png", ".jpg", ".jpeg")
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "test": "test", "testing": "test", "eval": "test",
    "evaluation": "test",
}  # fmt: skip


def is_picture(path: Path) -> bool:
    """Whether a file's name says so."""
    return path.suffix.lower() in SUFFIXES


def picture_files(folder: Path, split: str | None) -> tuple[Path, ...]:
    """Pictures below a folder in the order of their paths; hidden ones are left out.

    Args:
        folder: Holds a folder per label, or a folder per split that does.
        split: Wanted split; without one, `train` where there are splits, else all. Only folders
            above the label's tell a split: a label may be called "train" itself.
    """
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and is_picture(path)]
    shown = [(path, path.relative_to(folder).parts) for path in found]
    shown = [(path, parts) for path, parts in shown if not any(p.startswith(".") for p in parts)]

    def of(name: str) -> list[Path]:
        wanted = _SPLITS.get(name.lower(), name.lower())
        return [
            path
            for path, parts in shown
            if wanted in {_SPLITS.get(part.lower(), part.lower()) for part in parts[:-2]}
        ]

    if split is not None:
        return tuple(of(split))
    return tuple(of("train") or [path for path, _ in shown])


def named_picture(record: dict[str, Any], column: str, folder: Path) -> dict[str, Any]:
    """The record with the relative path of a picture made to start at `folder`, where one stands.

    >>> named_picture({"image": "a/b.png", "label": "x"}, "image", Path("data"))["image"]
    'data/a/b.png'
    """
    value = record.get(column)
    if not isinstance(value, str) or "://" in value or not is_picture(Path(value)):
        return record
    return {**record, column: str(folder / Path(value).expanduser())}
