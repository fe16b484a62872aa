"""A run folder has one writer, is never taken for something else, and is never overwritten."""

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
        assert (tmp_path / "result.json").exists(), "discarded before the new run is sure to start"
        folder.begin()
    assert not (tmp_path / "result.json").exists()


def test_a_run_to_go_on_with_is_not_discarded(tmp_path: Path) -> None:
    with RunFolder(tmp_path, restart=False) as folder:
        folder.write_settings({"task": "causal-lm"})
    with RunFolder(tmp_path, restart=False) as folder:
        folder.begin()
    assert (tmp_path / "run.yaml").exists()


def test_restart_removes_only_what_a_run_wrote(tmp_path: Path) -> None:
    RunFolder(tmp_path, restart=False).close()
    (tmp_path / "notes.txt").write_text("mine")
    ours = ("states", ".rehearsal", "earlier.json", "best-predictions.json", "evaluation")
    for name in ours:
        (tmp_path / name).mkdir()
    with RunFolder(tmp_path, restart=True) as folder:
        folder.begin()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not [name for name in ours if (tmp_path / name).exists()]


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {}")
    with pytest.raises(UserError, match=r"is no run folder \(it holds 'run.yaml'\)"):
        RunFolder(tmp_path, restart=False)
    assert (tmp_path / "run.yaml").read_text() == "model: {}"
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "run.yaml", restart=False)


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path, restart=False),
        pytest.raises(UserError, match=r"output\.folder = .*is training there"),
    ):
        RunFolder(tmp_path, restart=False)
    RunFolder(tmp_path, restart=False).close()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path, restart=False) as folder:
        (tmp_path / "data.json").mkdir()
        with pytest.raises(UserError, match=r"data\.json: cannot be written \(Is a directory\)"):
            folder.write_json("data.json", {})


def test_a_damaged_run_file_is_named(tmp_path: Path) -> None:
    RunFolder(tmp_path, restart=False).close()
    (tmp_path / "run.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"run\.yaml: cannot be read"):
        RunFolder(tmp_path, restart=False)


def test_a_damaged_json_file_is_named_and_a_missing_one_is_none(tmp_path: Path) -> None:
    with RunFolder(tmp_path, restart=False) as folder:
        assert folder.read_json("environment.json") is None
        (tmp_path / "environment.json").write_text("{")
        with pytest.raises(UserError, match=r"environment\.json: cannot be read"):
            folder.read_json("environment.json")
