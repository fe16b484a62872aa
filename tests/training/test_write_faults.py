"""The disk is full, a file is in the way, memory is short: a clear error, and nothing is lost."""

import shutil
from pathlib import Path

import pytest
import torch

from qlora_trainer.errors import UserError
from qlora_trainer.training.folder import RunFolder
from qlora_trainer.training.log import read_metrics
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.plan import TrainingPlan
from tests.training.tiny import adapted_llama, after_step, make_run, trained_values

PLAN = TrainingPlan(total_steps=4, learning_rate=1e-2, seed=5)


@pytest.fixture
def uninterrupted(tmp_path: Path) -> dict[str, torch.Tensor]:
    model = adapted_llama()
    run_training(make_run(tmp_path / "whole", model, total_steps=4), PLAN)
    return trained_values(model)


def finishes_as(expected: dict[str, torch.Tensor], folder: Path) -> bool:
    model = adapted_llama()
    assert run_training(make_run(folder, model, total_steps=4), PLAN).complete
    return all(torch.equal(value, trained_values(model)[name]) for name, value in expected.items())


def put_in_the_way(file: Path, obstacle: str) -> None:
    file.rename(file.with_name("kept"))
    if obstacle == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/full")


@pytest.mark.parametrize(
    ("obstacle", "reason"), [("folder", "Is a directory"), ("full disk", "No space left on device")]
)
def test_metrics_that_cannot_be_written_stop_the_run_with_its_steps_saved(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor], obstacle: str, reason: str
) -> None:
    if obstacle == "full disk" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    run = make_run(tmp_path / "run", adapted_llama(), total_steps=4)
    metrics = tmp_path / "run" / "metrics.jsonl"
    after_step(run, 2, lambda: put_in_the_way(metrics, obstacle))
    with pytest.raises(UserError) as caught:
        run_training(run, PLAN)
    message = str(caught.value)
    assert f"{metrics}: cannot be written ({reason}); saved states are untouched" in message
    assert '"step": 3, ' in message, "the line that was not written is lost"
    if obstacle == "folder":
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(Is a directory"):
            run_training(make_run(tmp_path / "run", adapted_llama(), total_steps=4), PLAN)
        metrics.rmdir()
    metrics.with_name("kept").replace(metrics)
    assert finishes_as(uninterrupted, tmp_path / "run")
    assert [record["step"] for record in read_metrics(metrics)] == [1, 2, 4]


def test_one_sequence_that_stops_fitting_midway_keeps_the_steps_before_it(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    model = adapted_llama()
    lines: list[str] = []
    run = make_run(tmp_path / "run", model, total_steps=4, lines=lines)

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    after_step(run, 2, lambda: model.model.norm.register_forward_pre_hook(refuse) and None)
    with pytest.raises(UserError, match=r"step 2: out of memory with a single sequence of 10 tok"):
        run_training(run, PLAN)
    assert "the state after step 2 is saved" in "\n".join(lines)
    assert finishes_as(uninterrupted, tmp_path / "run")


def test_a_run_that_cannot_be_discarded_stands_as_it_was(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", restart=False) as folder:
        folder.write_settings({"task": "causal-lm"})
        folder.write_json("result.json", {})
    for name in ("states", "adapter"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "tensors").write_bytes(b"kept")
    before = sorted(tmp_path.rglob("*"))
    with RunFolder(tmp_path / "run", restart=True) as folder:
        # Nothing can be made in the folder any more: the first thing needed fails.
        (tmp_path / "run").rename(tmp_path / "away")
        (tmp_path / "run").write_text("a file where the folder was")
        with pytest.raises(UserError, match=r"cannot be discarded \(Not a directory.*stands as it"):
            folder.begin()
        (tmp_path / "run").unlink()
        (tmp_path / "away").rename(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_fault_in_the_midst_of_discarding_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder(tmp_path, restart=False) as folder:
        folder.write_settings({"task": "causal-lm"})
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "tensors").write_bytes(b"kept")
    before = sorted(path for path in tmp_path.rglob("*"))
    rename = Path.rename

    def held(self: Path, target: Path) -> Path:
        if self.name == "run.yaml":
            raise PermissionError(1, "Operation not permitted", str(self))  # as for immutable files
        return rename(self, target)

    with RunFolder(tmp_path, restart=True) as folder:
        monkeypatch.setattr(Path, "rename", held)
        with pytest.raises(UserError, match=r"Operation not permitted: .*run\.yaml\); it stands"):
            folder.begin()
        monkeypatch.undo()
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "states" / "tensors").read_bytes() == b"kept"


def test_what_a_cut_short_discarding_left_is_removed(tmp_path: Path) -> None:
    RunFolder(tmp_path, restart=False).close()
    shutil.copytree(tmp_path, tmp_path / ".discarded-abc")
    with RunFolder(tmp_path, restart=False) as folder:
        folder.begin()
    assert not list(tmp_path.glob(".discarded-*"))
