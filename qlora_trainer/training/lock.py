"""One writer per run folder: a lock file that says who holds it, and is forgotten when they died.

A process number alone is reused, after a reboot soon; with the moment the process began and the
name of its machine it is not. The file is made exclusively and filled at once; one found empty a
moment after its making belongs to a process just starting. What another machine holds (a network
folder, a container) cannot be looked at from here and is respected.
"""

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from qlora_trainer.errors import UserError

_FILLED_WITHIN_SECONDS = 5.0  # from making the file to its content standing in it
_SAME_START_SECONDS = 10.0  # the system's clock may be set while a process runs


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock."""

    process: int
    started_seconds: float  # since 1970
    host: str


class FolderLock:
    """A lock held until `release`.

    Args:
        file: Where it stands; its folder exists.

    Raises:
        UserError: Another process holds it.
        OSError: The file cannot be written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._me = _this_process()
        _remove_stale(file)
        try:
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            raise _refusal(file) from None
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(asdict(self._me), stream)

    def release(self) -> None:
        """Let others take it; a lock that is no longer ours stays.

        So does one on a disk that cannot be written any more, which is told where it first hurt:
        nobody is kept out by the lock of a process that is gone.
        """
        with contextlib.suppress(OSError):
            if _holder(self._file) == self._me:
                self._file.unlink(missing_ok=True)


def _this_process() -> Holder:
    return Holder(os.getpid(), psutil.Process().create_time(), socket.gethostname())


def _holder(file: Path) -> Holder | None:
    """Who wrote the lock; None where nobody can be read in it, or it is gone."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Holder(int(content["process"]), float(content["started_seconds"]), content["host"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _is_stale(file: Path) -> bool:
    holder = _holder(file)
    if holder is None:
        try:
            return time.time() - file.stat().st_mtime > _FILLED_WITHIN_SECONDS
        except FileNotFoundError:
            return False
    if holder.host != socket.gethostname():
        return False
    try:
        process = psutil.Process(holder.process)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return abs(process.create_time() - holder.started_seconds) > _SAME_START_SECONDS
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False  # it lives; whose it is we may not see


def _remove_stale(file: Path) -> None:
    """Remove a dead process's lock; of several who try, one moves each file out of the way."""
    if not _is_stale(file):
        return
    aside = file.with_name(f".{file.name}.{os.getpid()}.old")
    try:
        file.rename(aside)
    except FileNotFoundError:
        return
    if not _is_stale(aside):  # someone was faster, and this is already theirs
        aside.rename(file)
        return
    aside.unlink()


def _refusal(file: Path) -> UserError:
    holder, folder = _holder(file), str(file.parent)
    if holder is None:
        who = "another process is just starting to train there"
    elif holder.host != socket.gethostname():
        return UserError(
            f"output.folder = {folder!r}: process {holder.process} on {holder.host!r} is training "
            f"there; wait for it, or name another folder. If that process is gone, delete {file}"
        )
    else:
        who = f"process {holder.process} is training there"
    return UserError(
        f"output.folder = {folder!r}: {who}; wait for it, stop it, or name another folder"
    )
