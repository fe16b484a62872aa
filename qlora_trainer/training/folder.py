"""The run folder: all a run leaves, each file saying what it is, one writer at a time.

run.yaml           the resolved settings
environment.json   versions and device
data.json          the data gate's report and the fingerprint of the encoded rows
audit.json         the base's bytes by role and dtype
metrics.jsonl      one line per logged step and evaluation
states/            saved states to resume from
adapter/           the trained adapter (the best one where there are held-out rows)
adapter-last/      the adapter of the last step, where the best one is an earlier one
loss.png           the loss curves
result.json        how the run ended; there only when it is complete
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from qlora_trainer.base.files import write_text_atomically
from qlora_trainer.errors import UserError

MARKER = ".qlora-run"  # tells a run folder from any folder that happens to hold a run.yaml
_OURS = (
    "run.yaml",
    "environment.json",
    "data.json",
    "audit.json",
    "memory.json",
    "metrics.jsonl",
    "states",
    "adapter",
    "adapter-last",
    "trackers",
    "failed-batch",
    "loss.png",
    "result.json",
    "run.lock",
)


class RunFolder:
    """A run folder held for writing until `close`; use it as a context manager.

    Attributes:
        path: The folder.
        earlier_settings: The settings of an unfinished run found there, or None.
    """

    def __init__(self, path: Path, *, restart: bool) -> None:
        self.path = path
        self._claim()
        try:
            if restart:
                self._discard()
            self.earlier_settings = self._earlier()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write to the folder."""
        (self.path / "run.lock").unlink(missing_ok=True)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write the resolved run file, which `qlora train` accepts as it is."""
        text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
        write_text_atomically(self.path / "run.yaml", text)

    def write_json(self, name: str, content: Any) -> None:
        """Write one of the folder's JSON files."""
        write_text_atomically(self.path / name, json.dumps(content, indent=2, ensure_ascii=False))

    def _claim(self) -> None:
        """Create the folder and its lock.

        Raises:
            UserError: It cannot be written, holds something else, or another process writes to it.
        """
        strangers = _strangers(self.path)
        if strangers:
            raise UserError(
                f"output.folder = {str(self.path)!r}: is no run folder (it holds "
                f"{strangers[0]!r}); name a new or empty one"
            )
        lock = self.path / "run.lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _remove_stale(lock)
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            raise UserError(
                f"output.folder = {str(self.path)!r}: process {lock.read_text().strip()} is "
                "training there; wait for it, stop it, or name another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"output.folder = {str(self.path)!r}: cannot be written: {error.strerror}"
            ) from None
        with os.fdopen(handle, "w") as file:
            file.write(str(os.getpid()))
        (self.path / MARKER).write_text("run folder of qlora_trainer, format 1\n")

    def _discard(self) -> None:
        for name in _OURS:
            entry = self.path / name
            if name == "run.lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    def _earlier(self) -> dict[str, Any] | None:
        """Settings of the unfinished run in the folder.

        Raises:
            UserError: The run there is complete, or its run file is damaged.
        """
        if (self.path / "result.json").exists():
            raise UserError(
                f"output.folder = {str(self.path)!r}: holds a finished run; name another folder, "
                "or pass --restart to discard it"
            )
        run_file = self.path / "run.yaml"
        if not run_file.exists():
            return None
        try:
            settings = yaml.safe_load(run_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(
                f"{run_file}: cannot be read ({error}); pass --restart to discard the run"
            ) from None
        return settings if isinstance(settings, dict) else None


def _strangers(path: Path) -> list[str]:
    """What stands in a folder that no run has written."""
    if path.exists() and not path.is_dir():
        raise UserError(f"output.folder = {str(path)!r}: is a file; name a folder")
    if not path.is_dir() or (path / MARKER).is_file():
        return []
    return sorted(entry.name for entry in path.iterdir() if entry.name != "run.lock")


def _remove_stale(lock: Path) -> None:
    """Remove the lock of a process that no longer runs, as after a kill."""
    try:
        owner = int(lock.read_text())
    except (FileNotFoundError, ValueError):
        lock.unlink(missing_ok=True)
        return
    if owner == os.getpid() or not psutil.pid_exists(owner):
        lock.unlink(missing_ok=True)
