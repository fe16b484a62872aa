"""The export's folder: built beside its place under a hidden name, and there only when complete.

One name per target, `.NAME.exporting`, with a lock in it: an export that was killed leaves that
folder, and the next one to the same target clears it away; two at a time exclude each other.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from qlora_trainer.base.files import sync_file, sync_folder
from qlora_trainer.errors import UserError
from qlora_trainer.units import format_bytes

_LOCK = ".exporting-process"
_SPARE_BYTES = 64 * 2**20  # tokenizer, report, the file system's own


@contextmanager
def building(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill that takes the target's place when the block ends well.

    Args:
        out: The target.
        overwrite: Whether a folder that stands there may be replaced.

    Raises:
        UserError: The target exists, another process exports to it, or it cannot be written; the
            disk filled up on the way.
    """
    if out.exists() and not overwrite:
        raise UserError(
            f"{out}: exists already and is not overwritten unless asked; name another folder, or "
            "pass --overwrite"
        )
    if out.is_file():
        raise UserError(f"{out}: is a file; name a folder")
    temporary = out.parent / f".{out.name}.exporting"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _claim(temporary, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    try:
        yield temporary
        _finish(temporary, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{out}: the disk filled up while exporting; nothing was left behind. Free some "
                "space, or name a folder on another disk"
            ) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_disk(out: Path, needed_bytes: int) -> None:
    """Refuse before the first byte what the disk cannot hold.

    Raises:
        UserError: Too little is free.
    """
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    needed = needed_bytes + _SPARE_BYTES
    if free < needed:
        raise UserError(
            f"{out}: the export needs {format_bytes(needed)} on this disk, "
            f"{format_bytes(free)} are free; free some, or name a folder on another disk"
        )


def _claim(temporary: Path, out: Path) -> None:
    lock = temporary / _LOCK
    if lock.is_file():
        owner = lock.read_text().strip()
        if owner.isdigit() and int(owner) != os.getpid() and psutil.pid_exists(int(owner)):
            raise UserError(f"{out}: process {owner} is exporting there; wait for it, or stop it")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    lock.write_text(str(os.getpid()))


def _finish(temporary: Path, out: Path) -> None:
    (temporary / _LOCK).unlink()
    for root, _, names in os.walk(temporary):
        for name in names:
            sync_file(Path(root, name))
        sync_folder(Path(root))
    aside = out.parent / f".{out.name}.replaced"
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        out.rename(aside)
    try:
        temporary.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
    sync_folder(out.parent)
    shutil.rmtree(aside, ignore_errors=True)
