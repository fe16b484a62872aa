"""SHA-256 of files; of large ones that stay as they are it is worked out once.

A file's checksum is remembered with its size, its inode and the times of its last changes of
content and of inode. Whatever writes to a file moves the last of them, even where a program sets
the others back. Clocks of file systems stand still for milliseconds, up to two seconds on FAT, so a
file that was touched just now is not remembered yet.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora_trainer.base.files import write_text_atomically

_BLOCK_BYTES = 2**22
_SETTLED_SECONDS = 3.0  # longer than a file system's clock stands still


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content.

    Raises:
        OSError: It cannot be read.
    """
    whole = hashlib.sha256()
    with path.open("rb") as content:
        while block := content.read(_BLOCK_BYTES):
            whole.update(block)
    return whole.hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Of several, some at one time: hashing lets go of the GIL.

    Raises:
        OSError: One cannot be read.
    """
    files = list(paths)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(sha256_of_file, files), strict=True))


def remembered_checksums(
    paths: Iterable[Path], memory: Path, *, settled_seconds: float = _SETTLED_SECONDS
) -> dict[Path, str]:
    """SHA-256 of files, read only where they are new or have been touched.

    Args:
        paths: Files; links are followed.
        memory: JSON file of what is remembered, made where there is none. One that cannot be
            read, as of another program, is written anew.
        settled_seconds: Files touched less long ago are not remembered.

    Raises:
        OSError: A file cannot be read, or `memory` not be written.
    """
    states = {path: _state(path) for path in paths}  # before they are read
    settled_before_ns = time.time_ns() - int(settled_seconds * 1e9)
    known, found, entries = _remembered(memory), {}, {}
    for path, state in states.items():
        entry = known.get(str(path.resolve()))
        if isinstance(entry, dict) and _is_of(entry, state):
            found[path] = entry["sha256"]
    new = sha256_of_files(states.keys() - found.keys())
    for path, digest in new.items():
        if max(states[path]["modified_ns"], states[path]["changed_ns"]) < settled_before_ns:
            entries[str(path.resolve())] = states[path] | {"sha256": digest}
    if entries:
        write_text_atomically(memory, json.dumps(_remembered(memory) | entries, indent=1))
    return found | new


def _state(path: Path) -> dict[str, int]:
    found = path.stat()
    return {
        "bytes": found.st_size,
        "inode": found.st_ino,
        "modified_ns": found.st_mtime_ns,
        "changed_ns": found.st_ctime_ns,
    }


def _is_of(entry: dict[str, Any], state: dict[str, int]) -> bool:
    whole = isinstance(entry.get("sha256"), str)
    return whole and all(entry.get(name) == value for name, value in state.items())


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        found = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
