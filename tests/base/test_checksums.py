"""A remembered checksum is the file's own: whatever changes a file makes it be read again."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from qlora_trainer.base.checksums import remembered_checksums, sha256_of_file

CONTENT = b"weights" * 1000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


def remembered(paths: list[Path], memory: Path) -> dict[Path, str]:
    """As if every file had been written long ago."""
    return remembered_checksums(paths, memory, settled_seconds=-1e6)


def remember_as(memory: Path, digest: str) -> None:
    known = json.loads(memory.read_text())
    memory.write_text(json.dumps({k: v | {"sha256": digest} for k, v in known.items()}))


def test_the_checksum_is_sha256(file: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert sha256_of_file(file) == digest
    assert remembered_checksums([file], tmp_path / "memory.json") == {file: digest}


def test_an_untouched_file_is_not_read_again(file: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    remembered([file], memory)
    remember_as(memory, "remembered")  # tells what is remembered from what is read
    assert remembered([file], memory) == {file: "remembered"}
    link = tmp_path / "link"
    link.symlink_to(file)
    assert remembered([link], memory) == {link: "remembered"}


def test_a_changed_file_is_read_again_even_with_its_old_time(file: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    remembered([file], memory)
    before = file.stat()
    os.utime(file, ns=(1, 1))  # so that the next change surely moves the clock
    remembered([file], memory)
    with file.open("r+b") as content:
        content.seek(77)
        content.write(b"W")
    os.utime(file, ns=(1, 1))
    assert file.stat().st_size == before.st_size
    assert file.stat().st_ino == before.st_ino
    found = remembered([file], memory)
    assert found == {file: hashlib.sha256(file.read_bytes()).hexdigest()}
    assert found[file] != hashlib.sha256(CONTENT).hexdigest()


def test_a_file_touched_just_now_is_not_remembered(file: Path, tmp_path: Path) -> None:
    remembered_checksums([file], tmp_path / "memory.json")
    assert not (tmp_path / "memory.json").exists()


@pytest.mark.parametrize("broken", ["[", "[]", '{"PATH": 1}', '{"PATH": {"sha256": "x"}}'])
def test_a_memory_that_says_something_else_is_written_anew(
    file: Path, tmp_path: Path, broken: str
) -> None:
    memory = tmp_path / "memory.json"
    memory.write_text(broken.replace("PATH", str(file.resolve())))
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert remembered([file], memory) == {file: digest}
    assert json.loads(memory.read_text())[str(file.resolve())]["sha256"] == digest


def test_files_of_other_folders_stay_remembered(file: Path, tmp_path: Path) -> None:
    memory, other = tmp_path / "memory.json", tmp_path / "other"
    other.write_bytes(b"other")
    remembered([file], memory)
    remembered([other], memory)
    assert set(json.loads(memory.read_text())) == {str(file.resolve()), str(other.resolve())}
