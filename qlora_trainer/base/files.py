"""Files and folders that are either the old or the new, never a torn mixture.

Everything is written beside its final place under a hidden name, forced to disk, and renamed; the
folder's entry is forced to disk as well, so a power cut after the call loses nothing. On Windows a
folder cannot be opened and that last step is skipped.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def sync_file(path: Path) -> None:
    """Force a file's content to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _give_usual_mode(path: Path, mode: int) -> None:
    # tempfile makes private names; what others may read is the user's umask to decide.
    mask = os.umask(0o077)  # can only be read by setting it; strict, for other threads' files
    os.umask(mask)
    path.chmod(mode & ~mask)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write one file whole or not at all.

    Args:
        path: Where it shall stand; its folder is made.
        write: Called with the temporary path to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        _give_usual_mode(temporary, 0o666)
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Write a whole folder, taking the place of one that stands there.

    A folder that is new appears in one rename. One that is replaced is set aside and deleted after
    the new one stands; cut short between the two renames, it waits as `.<name>.<random>.old`.

    Args:
        folder: Where it shall stand; its parent is made.
        fill: Called with the temporary folder to write into.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    aside = temporary.with_suffix(".old")
    try:
        fill(temporary)
        _give_usual_mode(temporary, 0o777)
        put_in_place(temporary, folder, aside)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(filled: Path, folder: Path, aside: Path) -> None:
    """Force a filled folder to disk and let it take the place of another.

    Args:
        filled: Beside `folder`.
        folder: Where it shall stand; what stands there is deleted once the new one does.
        aside: What stood there waits here between the two renames.
    """
    for root, _, names in os.walk(filled):
        for name in names:
            _give_usual_mode(Path(root, name), 0o666)  # safetensors makes its files private
            sync_file(Path(root, name))
        sync_folder(Path(root))
    if folder.exists():
        folder.rename(aside)
    try:
        filled.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that the file is the old one or the whole new one, never a part."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
