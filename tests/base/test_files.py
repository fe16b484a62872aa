"""A reader sees the old file or folder, or the new one."""

import os
from pathlib import Path

import pytest

from qlora_trainer.base.files import replace_folder, write_atomically


def fail(path: Path) -> None:
    if path.is_dir():
        (path / "half").write_text("half")
    else:
        path.write_text("half")
    raise RuntimeError("power cut")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_is_replaced_whole_and_made_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, lambda p: p.write_text("one"))
    write_atomically(path, lambda p: p.write_text("two"))
    assert path.read_text() == "two"
    assert names(tmp_path) == ["a", "a/b.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    write_atomically(path, lambda p: p.write_text("one"))
    with pytest.raises(RuntimeError, match="power cut"):
        write_atomically(path, fail)
    assert path.read_text() == "one"
    assert names(tmp_path) == ["b.txt"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    replace_folder(folder, lambda p: (p / "old").write_text("1"))
    replace_folder(folder, lambda p: (p / "new").write_text("2"))
    assert names(tmp_path) == ["deep", "deep/state", "deep/state/new"]


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    replace_folder(folder, lambda p: (p / "old").write_text("1"))
    with pytest.raises(RuntimeError, match="power cut"):
        replace_folder(folder, fail)
    assert names(tmp_path) == ["state", "state/old"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_modes_are_the_user_s_own(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    write_atomically(tmp_path / "file", lambda p: p.write_text(""))
    replace_folder(tmp_path / "state", lambda p: None)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "folder").stat().st_mode
