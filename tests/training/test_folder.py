"""A run folder has one writer, is never taken for something else, and is never overwritten."""

import os
from pathlib import Path

import pytest

from qlora_trainer.errors import UserError
from qlora_trainer.training.folder import RunFolder


def test_an_unfinished_run_is_found_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", restart=False) as folder:
        assert folder.earlier_settings is None
        folder.write_settings({"task": "causal-lm"})
    with RunFolder(tmp_path / "run", restart=False) as folder:
        assert folder.earlier_settings == {"task": "causal-lm"}


def test_a_finished_run_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    with RunFolder(tmp_path, restart=False) as folder:
        folder.write_settings({"task": "causal-lm"})
        folder.write_json("result.json", {})
    with pytest.raises(UserError, match=r"finished run.*--restart"):
        RunFolder(tmp_path, restart=False)
    with RunFolder(tmp_path, restart=True) as folder:
        assert folder.earlier_settings is None
    assert not (tmp_path / "result.json").exists()


def test_restart_removes_only_what_a_run_wrote(tmp_path: Path) -> None:
    RunFolder(tmp_path, restart=False).close()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "states").mkdir()
    RunFolder(tmp_path, restart=True).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "states").exists()


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {}")
    with pytest.raises(UserError, match=r"is no run folder \(it holds 'run.yaml'\)"):
        RunFolder(tmp_path, restart=False)
    assert (tmp_path / "run.yaml").read_text() == "model: {}"
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "run.yaml", restart=False)


def test_two_writers_are_refused_but_a_dead_one_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(str(os.getppid()))
    with pytest.raises(UserError, match=f"process {os.getppid()} is training there"):
        RunFolder(tmp_path, restart=False)
    (tmp_path / "run.lock").write_text("999999999")
    RunFolder(tmp_path, restart=False).close()


def test_a_damaged_run_file_is_named(tmp_path: Path) -> None:
    RunFolder(tmp_path, restart=False).close()
    (tmp_path / "run.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"run\.yaml: cannot be read"):
        RunFolder(tmp_path, restart=False)
