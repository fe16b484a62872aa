"""The worst is tried before step 1, and leaves no trace: same bits, same files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.errors import UserError
from qlora_trainer.training.log import read_metrics
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.plan import Rehearsal, TrainingPlan
from qlora_trainer.training.scaler import LossScaler
from tests.training.test_attempt import SmallMemory, fp16_llama
from tests.training.tiny import adapted_llama, batch, held_out, make_run, trained_values

PLAN = TrainingPlan(total_steps=5, learning_rate=1e-2, seed=5, evaluate_every_steps=2)


def longest(rows: int = 2) -> Rehearsal:
    return Rehearsal([batch(rows, 30, 1)] * 2, batch(3, 40, 2))


def files(folder: Path) -> dict[str, Any]:
    """Everything a run left but times: tensors' bytes, and the numbers of its lines."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")
    }
    found |= {str(path.relative_to(folder)): None for path in folder.rglob("*")}
    keys = ("kind", "step", "loss", "eval_loss", "gradient_norm")
    found["lines"] = [
        {k: line.get(k) for k in keys} for line in read_metrics(folder / "metrics.jsonl")
    ]
    return found


@pytest.mark.parametrize("kind", ["paged_adamw_32bit", "adamw_8bit", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rehearsed_run_ends_with_the_same_bits_and_files(
    tmp_path: Path, kind: Any, dtype: torch.dtype
) -> None:
    ends = []
    for name, rehearsal in (("plain", None), ("rehearsed", longest())):
        model = adapted_llama(dtype, dropout=0.2)
        torch.manual_seed(11)
        lines: list[str] = []
        run = make_run(
            tmp_path / name, model, total_steps=5, kind=kind, eval_batches=held_out(),
            rehearsal=rehearsal, lines=lines,
        )  # fmt: skip
        run_training(run, PLAN)
        ends.append((trained_values(model), files(tmp_path / name), torch.get_rng_state()))
        told = [line for line in lines if line.startswith("rehearsed in")]
        assert bool(told) == (rehearsal is not None)
    (values, left, state), (same_values, same_left, same_state) = ends
    assert all(torch.equal(values[name], same_values[name]) for name in values)
    assert torch.equal(state, same_state)
    assert left == same_left


def test_gradients_that_overflow_at_the_scale_of_fp16_do_not_end_the_rehearsal(
    tmp_path: Path,
) -> None:
    model = fp16_llama(limit=1.0)  # the scale is halved until they no longer do
    run = make_run(
        tmp_path, model, total_steps=5, eval_batches=held_out(), rehearsal=longest(),
        scaler=LossScaler(),
    )  # fmt: skip
    outcome = run_training(run, PLAN)
    assert outcome.step == 5
    assert outcome.overflows >= 3


def test_a_batch_too_large_is_cut_before_the_first_step(tmp_path: Path) -> None:
    model = adapted_llama()
    model.model.norm = SmallMemory(model.model.norm, rows=2)
    lines: list[str] = []
    run = make_run(tmp_path, model, total_steps=5, rows=4, rehearsal=longest(4), lines=lines)
    outcome = run_training(run, PLAN)
    assert outcome.micro_batch_parts == 2
    assert model.model.norm.refusals == 1  # in the rehearsal, and never again
    assert any(line.startswith("rehearsal of the longest batch: out of memory") for line in lines)


def test_a_sequence_that_does_not_fit_is_refused_before_anything_moves(tmp_path: Path) -> None:
    model = adapted_llama()
    before = {name: value.clone() for name, value in trained_values(model).items()}
    model.model.norm = SmallMemory(model.model.norm, rows=0)
    run = make_run(tmp_path, model, total_steps=5, rehearsal=longest())
    with pytest.raises(UserError, match=r"rehearsal.*single sequence of 30 tokens"):
        run_training(run, PLAN)
    assert all(torch.equal(before[name], value) for name, value in trained_values(model).items())
    assert not (tmp_path / ".rehearsal").exists()


class Replacing(torch.nn.Module):
    """A norm that puts a longer tensor in its buffer's place at each pass, as caches grow."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> Any:
        self.seen = torch.cat([self.seen, torch.ones(1)])
        return self.inner(x)


def test_buffers_that_a_forward_replaces_are_put_back(tmp_path: Path) -> None:
    lengths = []
    for name, rehearsal in (("plain", None), ("rehearsed", longest())):
        model = adapted_llama()
        model.model.norm = Replacing(model.model.norm)
        run_training(make_run(tmp_path / name, model, total_steps=5, rehearsal=rehearsal), PLAN)
        lengths.append(model.model.norm.seen.tolist())
    assert len(lengths[0]) > 2
    assert lengths[0] == lengths[1]


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, adapted_llama(), total_steps=5, rehearsal=longest())

    def full(_: Path) -> None:
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        run_training(replace(run, save_adapter=full), PLAN)
    assert not (tmp_path / ".rehearsal").exists()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
