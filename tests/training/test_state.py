import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_trainer.errors import UserError
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.state import newest_good_state, restore, save_state


def optimizer(value: float = 0.0) -> AdapterAdamW:
    return AdapterAdamW(
        {
            "a": nn.Parameter(torch.full((3, 4), value)),
            "b": nn.Parameter(torch.full((5,), value, dtype=torch.bfloat16)),
        }
    )


def save(states: Path, *steps: int, keep_last: int = 9) -> None:
    for step in steps:
        save_state(
            states,
            step,
            optimizer=optimizer(float(step)),
            trainer={"course": {"step": step}},
            keep_last=keep_last,
        )


def names(states: Path) -> list[str]:
    return sorted(entry.name for entry in states.iterdir())


def test_a_state_comes_back_exactly(tmp_path: Path) -> None:
    held = optimizer(0.3)
    for p in held.parameters.values():
        p.grad = torch.ones_like(p)
    held.step(1e-3)
    save_state(tmp_path, 1, optimizer=held, trainer={"x": [1.5]}, keep_last=1)
    saved = newest_good_state(tmp_path, print)
    assert saved is not None
    fresh = optimizer()
    restore(saved, fresh)
    assert all(torch.equal(p, fresh.parameters[n]) for n, p in held.parameters.items())
    theirs = {name: tensor for name, tensor, _ in fresh.state_tensors()}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor, _ in held.state_tensors())
    assert fresh.steps == {"a": 1, "b": 1}
    assert saved.trainer["x"] == [1.5]


def test_only_the_last_n_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, 100_000_000, keep_last=2)
    assert names(tmp_path) == ["step-00000015", "step-100000000"]


def test_a_damaged_state_ahead_of_the_run_goes_with_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1, 9)
    truncate("adapter.safetensors")(tmp_path / "step-00000009")
    save(tmp_path, 2, keep_last=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_state_passed_over_takes_no_whole_ones_place(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    truncate("adapter.safetensors")(tmp_path / "step-00000002")
    found = newest_good_state(tmp_path, print)
    assert found is not None
    assert found.passed_over == (tmp_path / "step-00000002",)
    values = optimizer(3.0)
    save_state(
        tmp_path, 3, optimizer=values, trainer={}, keep_last=2, damaged=found.passed_over
    )  # past the damaged one
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_state_passed_over_stays_when_it_is_written_anew(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    truncate("adapter.safetensors")(tmp_path / "step-00000002")
    found = newest_good_state(tmp_path, print)
    assert found is not None
    values = optimizer(2.0)
    for _ in range(2):
        save_state(
            tmp_path, 2, optimizer=values, trainer={}, keep_last=2, damaged=found.passed_over
        )
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def truncate(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(bytes(content))

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


FILES = ("adapter.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json")
DAMAGES = {
    **{f"{name} cut short": truncate(name) for name in FILES},
    **{f"one bit of {name} flipped": flip(name) for name in FILES[:3]},
    **{f"{name} gone": remove(name) for name in FILES},
    "manifest of another kind": write("manifest.json", "[1, 2]"),
    "manifest without a file": write("manifest.json", "{}"),
    "manifest empty": write("manifest.json", ""),
    "manifest not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "folder empty": lambda folder: (shutil.rmtree(folder), folder.mkdir())[-1],
    "state of another step": lambda folder: (
        shutil.rmtree(folder), shutil.copytree(folder.parent / "step-00000001", folder))[0],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_passed_over_aloud_for_the_newest_whole_one(
    tmp_path: Path, damage: str
) -> None:
    save(tmp_path, 1, 2, 3)
    DAMAGES[damage](tmp_path / "step-00000003")
    said: list[str] = []
    saved = newest_good_state(tmp_path, said.append)
    assert saved is not None
    assert saved.step == 2
    assert torch.equal(saved.parameters["a"], torch.full((3, 4), 2.0))
    assert "step-00000003" in said[0]
    assert "damaged" in said[0]
    assert "step-00000002" in said[-1]


def test_no_whole_state_is_an_error_and_not_a_silent_start_from_zero(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for folder in tmp_path.iterdir():
        flip("adapter.safetensors")(folder)
    with pytest.raises(UserError, match=r"(?s)no saved state is whole.*--restart.*2 faults"):
        newest_good_state(tmp_path, print)


def test_no_state_at_all_is_a_start(tmp_path: Path) -> None:
    assert newest_good_state(tmp_path / "states", print) is None
    assert newest_good_state(tmp_path, print) is None


def test_leftovers_of_an_interrupted_write_are_removed_and_strangers_are_not(
    tmp_path: Path,
) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step-00000002.k3j2_x.tmp").mkdir()
    (tmp_path / ".step-00000002.k3j2_x.tmp" / "adapter.safetensors").write_bytes(b"half")
    (tmp_path / ".step-00000001.abc.old").mkdir()
    (tmp_path / "my notes").mkdir()
    assert newest_good_state(tmp_path, print) is not None
    assert names(tmp_path) == ["my notes", "step-00000001"]


def test_a_state_set_aside_while_it_was_replaced_is_put_back(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.abc.old")
    saved = newest_good_state(tmp_path, print)
    assert saved is not None
    assert saved.step == 2


def test_a_write_that_fails_leaves_the_older_state_alone(
    tmp_path: Path,
) -> None:
    save(tmp_path, 1, keep_last=1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_state(tmp_path, 2, optimizer=optimizer(), trainer={"x": object()}, keep_last=1)
    assert names(tmp_path) == ["step-00000001"]


def test_a_folder_that_cannot_be_written_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "states").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot be saved.*earlier states are untouched"):
        save(tmp_path / "states", 1)


def test_a_damaged_state_is_replaced_when_its_step_is_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    flip("trainer.json")(tmp_path / "step-00000002")
    save(tmp_path, 2)
    saved = newest_good_state(tmp_path, print)
    assert saved is not None
    assert saved.step == 2


def test_a_newer_format_is_not_taken_for_damage(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    trainer = json.loads((folder / "trainer.json").read_text())
    text = json.dumps({**trainer, "format_version": 99})
    (folder / "trainer.json").write_text(text)
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["trainer.json"] = {
        "bytes": len(text),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="newer version"):
        newest_good_state(tmp_path, print)


def test_a_state_of_other_adapters_is_refused_with_every_fault(tmp_path: Path) -> None:
    save(tmp_path, 1)
    saved = newest_good_state(tmp_path, print)
    assert saved is not None
    other = AdapterAdamW(
        {"a": nn.Parameter(torch.zeros(4, 4)), "c": nn.Parameter(torch.zeros(2, 2))}
    )
    with pytest.raises(UserError) as fault:
        restore(saved, other)
    for expected in ("a: saved (3, 4)", "b: not trained by this run", "c: not in the saved state"):
        assert expected in str(fault.value)
    assert not other.parameters["a"].any()
