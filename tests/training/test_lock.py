"""A lock is respected while its holder lives, and forgotten when they do not."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_trainer.errors import UserError
from qlora_trainer.training.lock import FolderLock


def write_lock(file: Path, process: int, **changes: Any) -> None:
    started = psutil.Process(process).create_time() if psutil.pid_exists(process) else 0.0
    holder = {"process": process, "started_seconds": started, "host": socket.gethostname()}
    file.write_text(json.dumps(holder | changes))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_living_holder_is_respected(tmp_path: Path) -> None:
    file = tmp_path / "run.lock"
    write_lock(file, os.getppid())
    with pytest.raises(UserError, match=f"process {os.getppid()} is training there"):
        FolderLock(file)
    assert file.exists()


def test_a_dead_holder_is_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "run.lock"
    write_lock(file, dead_process())
    FolderLock(file).release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_in_other_use_by_now_is_a_dead_holder(tmp_path: Path) -> None:
    file = tmp_path / "run.lock"
    write_lock(file, os.getppid(), started_seconds=1_000_000_000.0)
    FolderLock(file).release()


def test_a_holder_on_another_machine_is_respected_and_the_way_out_is_said(tmp_path: Path) -> None:
    file = tmp_path / "run.lock"
    write_lock(file, dead_process(), host="another")
    with pytest.raises(UserError, match=rf"on 'another' is training there.*delete {file}"):
        FolderLock(file)
    assert file.exists()


@pytest.mark.parametrize("content", ["", '{"process": 12', "4711"])
def test_an_unfinished_lock_belongs_to_a_starting_process_for_a_moment_only(
    tmp_path: Path, content: str
) -> None:
    file = tmp_path / "run.lock"
    file.write_text(content)
    with pytest.raises(UserError, match="just starting"):
        FolderLock(file)
    os.utime(file, (1_000_000_000, 1_000_000_000))
    FolderLock(file).release()


def test_only_our_own_lock_is_released(tmp_path: Path) -> None:
    file = tmp_path / "run.lock"
    lock = FolderLock(file)
    write_lock(file, os.getppid())
    lock.release()
    assert file.exists()


def test_a_lock_that_cannot_be_removed_hides_no_other_error(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder / "run.lock")
    folder.rename(tmp_path / "away")
    folder.write_text("a file where the folder was")
    lock.release()
    folder.unlink()
    (tmp_path / "away").rename(folder)
    assert (folder / "run.lock").exists()
