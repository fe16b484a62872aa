"""The export's folder: built beside its place under a hidden name, and there only when complete.

One name per target, `.NAME.exporting`, with a lock in it: an export that was killed leaves that
folder, and the next one to the same target clears it away; two at a time exclude each other.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from qlora_trainer.base.files import put_in_place
from qlora_trainer.errors import UserError
from qlora_trainer.units import format_bytes

_LOCK = ".exporting-process"
_SPARE_BYTES = 64 * 2**20  # report, card, the file system's own
_SAME_START_SECONDS = 10.0  # the system's clock may be set while a process runs


def check_target(out: Path, *, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Refuse before any work a folder that may not be written.

    Args:
        out: The target.
        overwrite: Whether a folder that stands there may be replaced.
        sources: Folders that are read; replacing one of them, or one around it, would destroy it.

    Raises:
        UserError: The target exists and may not be replaced, or holds what is exported.
    """
    if out.exists() and not overwrite:
        raise UserError(
            f"{out}: exists already and is not overwritten unless asked; name another folder, or "
            "pass --overwrite"
        )
    if out.is_file():
        raise UserError(f"{out}: is a file; name a folder")
    place = out.resolve()
    for source in (*sources, Path.cwd()):
        if source.resolve().is_relative_to(place):
            raise UserError(
                f"{out}: replacing it would delete {source.resolve()}, which is in use; name "
                "another folder"
            )


@contextmanager
def building(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill that takes the target's place when the block ends well.

    Args:
        out: The target.
        overwrite: Whether a folder that stands there may be replaced.

    Raises:
        UserError: The target exists, another process exports to it, or it cannot be written; the
            disk filled up or failed on the way.
    """
    place = out.absolute()
    temporary = place.parent / f".{place.name}.exporting"
    aside = place.parent / f".{place.name}.replaced"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if aside.is_dir() and not place.exists():
            aside.rename(place)  # an export was cut short between two renames: put it back
        check_target(out, overwrite=overwrite)
        _claim(temporary, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    try:
        yield temporary
        (temporary / _LOCK).unlink()
        shutil.rmtree(aside, ignore_errors=True)
        put_in_place(temporary, place, aside)
    except OSError as error:
        raise _failed(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _failed(out: Path, error: OSError) -> Exception:
    """What a failing disk means for the user; other errors as they are."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{out}: the disk filled up while exporting; nothing was left behind. Free some "
            "space, or name a folder on another disk"
        )
    if error.errno in (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG):
        where = f" ({error.filename})" if error.filename else ""
        return UserError(
            f"{out}: reading or writing failed: {error.strerror}{where}; nothing was left behind. "
            "Look at the disk and its permissions"
        )
    return error


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
        number, _, started = lock.read_text().strip().partition(" ")
        if number.isdigit() and int(number) != os.getpid() and _lives(int(number), started):
            raise UserError(f"{out}: process {number} is exporting there; wait for it, or stop it")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    lock.write_text(f"{os.getpid()} {psutil.Process().create_time()}")


def _lives(number: int, started: str) -> bool:
    """Whether a process still runs; a number alone is used again, after a reboot soon."""
    try:
        process = psutil.Process(number)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return not started or abs(process.create_time() - float(started)) <= _SAME_START_SECONDS
    except psutil.NoSuchProcess:
        return False
    except (psutil.AccessDenied, ValueError):
        return True
