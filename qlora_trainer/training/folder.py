"""The run folder: all a run leaves, each file saying what it is, one writer at a time.

run.yaml           the resolved settings
environment.json   versions and device
data.json          the data gate's report and the fingerprint of the encoded rows
audit.json         the base's bytes by role and dtype
memory.json        memory foreseen, and measured where the run has ended
earlier.json       the rows of the run gone on from, scored before and after (adapter.init_from)
metrics.jsonl      one line per logged step and evaluation
states/            saved states to resume from
adapter/           the trained adapter (the best one where there are held-out rows)
adapter-last/      the adapter of the last step, where the best one is an earlier one
best-predictions.json  what that adapter said of the held-out rows, for tasks that predict
evaluation/        what `qlora evaluate` found of the finished run
loss.png           the loss curves
result.json        how the run ended; there only when it is complete
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from qlora_trainer.base.files import write_text_atomically
from qlora_trainer.errors import UserError
from qlora_trainer.training.lock import FolderLock

BEST_PREDICTIONS = "best-predictions.json"
EVALUATION = "evaluation"
MARKER = ".qlora-run"  # tells a run folder from any folder that happens to hold a run.yaml
_DISCARDED = ".discarded-"
# In the order they are discarded: cut short, no state is left to be taken for a later run's, and
# what says that a run stands here goes last.
_OURS = (
    "states",
    "adapter",
    "adapter-last",
    BEST_PREDICTIONS,
    EVALUATION,
    "trackers",
    "failed-batch",
    ".rehearsal",
    "earlier.json",
    "environment.json",
    "data.json",
    "audit.json",
    "memory.json",
    "metrics.jsonl",
    "loss.png",
    "run.yaml",
    "result.json",
)


class RunFolder:
    """A run folder held for writing until `close`; use it as a context manager.

    Args:
        path: The folder.
        restart: What a run left there is to be discarded, once `begin` is called.
        writes: False for all but the main process of a run: nothing is touched then, nor looked at.

    Attributes:
        path: The folder.
        earlier_settings: The settings of an unfinished run to go on with, or None.
    """

    def __init__(self, path: Path, *, restart: bool, writes: bool = True) -> None:
        self.path = path
        self._restart = restart
        self._lock: FolderLock | None = None
        self.earlier_settings: dict[str, Any] | None = None
        if not writes:
            return
        self._lock = self._claim()
        try:
            self.earlier_settings = None if restart else self._earlier()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write to the folder."""
        if self._lock is not None:
            self._lock.release()

    def begin(self) -> None:
        """Make room for what is about to be written: with `restart` the earlier run goes now.

        Call it when nothing is left that could refuse the new run.

        Raises:
            UserError: The earlier run cannot be discarded; it stands as it was.
        """
        if self._lock is None:
            return
        for leftover in self.path.glob(f"{_DISCARDED}*"):  # of a process cut short
            shutil.rmtree(leftover, ignore_errors=True)
        if self._restart:
            self._discard()

    def read_json(self, name: str) -> Any:
        """Read one of the folder's JSON files; None where it is missing.

        Raises:
            UserError: It is damaged.
        """
        file = self.path / name
        if self._lock is None:
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{file}: cannot be read ({error}); put it back, or pass --restart to discard "
                "the run"
            ) from None

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write the resolved run file, which `qlora train` accepts as it is."""
        text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
        self._write("run.yaml", text)

    def write_json(self, name: str, content: Any) -> None:
        """Write one of the folder's JSON files."""
        self._write(name, json.dumps(content, indent=2, ensure_ascii=False))

    def _write(self, name: str, text: str) -> None:
        if self._lock is None:
            return
        with self.writing(name):
            write_text_atomically(self.path / name, text)

    @contextmanager
    def writing(self, name: str = "") -> Iterator[None]:
        """Within, what the system refuses is the user's to mend.

        Args:
            name: Of what is written; without one, what the system names.

        Raises:
            UserError: Something could not be written.
        """
        try:
            yield
        except OSError as error:
            place = self.path / name if name else error.filename or self.path
            raise UserError(
                f"{place}: cannot be written ({error.strerror or error}); what was saved so far "
                "stands. Make room or mend the folder, then run the same command again"
            ) from error

    def _claim(self) -> FolderLock:
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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / MARKER).exists():
                (self.path / MARKER).write_text("run folder of qlora_trainer, format 1\n")
            return FolderLock(self.path / "run.lock")
        except OSError as error:
            raise UserError(
                f"output.folder = {str(self.path)!r}: cannot be written: {error.strerror}"
            ) from None

    def _discard(self) -> None:
        # Renamed out of the way before the first byte goes: a fault on the way is undone.
        moved: list[str] = []
        aside: Path | None = None
        try:
            aside = Path(tempfile.mkdtemp(prefix=_DISCARDED, dir=self.path))
            for name in filter(lambda name: os.path.lexists(self.path / name), _OURS):
                (self.path / name).rename(aside / name)
                moved.append(name)
        except OSError as error:
            if aside is not None:
                for name in moved:
                    (aside / name).rename(self.path / name)
                aside.rmdir()
            raise UserError(
                f"{self.path}: the run there cannot be discarded ({error.strerror}: "
                f"{error.filename}); it stands as it was. Mend the folder or name another "
                "output.folder"
            ) from error
        shutil.rmtree(aside, ignore_errors=True)

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
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
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
