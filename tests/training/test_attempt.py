from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_trainer.base.packed_attention import use_packed_attention
from qlora_trainer.errors import UserError
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.tasks.task import cut_rows
from qlora_trainer.training.log import read_metrics
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.plan import TrainingPlan
from qlora_trainer.training.scaler import LossScaler
from qlora_trainer.training.windows import Windows
from tests.training.tiny import adapted_llama, batch, make_run, optimizer_for, trained_values


class SmallMemory(nn.Module):
    """A norm that only fits so many rows, as a card does."""

    def __init__(self, inner: nn.Module, rows: int) -> None:
        super().__init__()
        self.inner, self.rows, self.refusals = inner, rows, 0

    def forward(self, x: torch.Tensor) -> Any:
        if self.training and x.shape[0] > self.rows:
            self.refusals += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.inner(x)


PLAN = TrainingPlan(total_steps=4, learning_rate=1e-2, seed=1)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_result(tmp_path: Path) -> None:
    roomy = adapted_llama()
    run_training(make_run(tmp_path / "a", roomy, total_steps=4, rows=6), PLAN)
    tight = adapted_llama()
    tight.model.norm = SmallMemory(tight.model.norm, rows=2)
    lines: list[str] = []
    outcome = run_training(
        make_run(tmp_path / "b", tight, total_steps=4, rows=6, lines=lines), PLAN
    )
    assert outcome.micro_batch_parts == 4
    assert tight.model.norm.refusals == 2  # 6 rows, then 3; never tried again in later steps
    told = [line for line in lines if "out of memory" in line]
    assert len(told) == 2
    assert "effective batch and the result stay the same" in told[0]
    expected, got = trained_values(roomy), trained_values(tight)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)


def test_one_sequence_that_does_not_fit_stops_with_a_way_out(tmp_path: Path) -> None:
    model = adapted_llama()
    model.model.norm = SmallMemory(model.model.norm, rows=0)
    with pytest.raises(UserError, match=r"single sequence of 10 tokens.*data\.max_seq_len"):
        run_training(make_run(tmp_path, model, total_steps=4, rows=2), PLAN)


LENGTHS = (7, 4, 5, 9, 4)


def packed_row(seed: int) -> dict[str, torch.Tensor]:
    """Five examples end to end in one row, the third of them not trained on."""
    parts = [batch(1, length, seed + n) for n, length in enumerate(LENGTHS)]
    for part in parts:
        part["labels"][:, 0] = -100
    parts[2]["labels"][:] = -100
    row = {name: torch.cat([part[name] for part in parts], 1) for name in ("input_ids", "labels")}
    return {**row, "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}


class SmallRow(SmallMemory):
    """As `SmallMemory`, for so many tokens."""

    def forward(self, x: torch.Tensor) -> Any:
        if self.training and x.shape[1] > self.rows:
            self.refusals += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.inner(x)


def packed_run(folder: Path, model: Any, lines: list[str] | None = None) -> Any:
    run = make_run(folder, model, total_steps=2, lines=lines)
    windows = Windows(lambda epoch: [packed_row(10 * n) for n in range(4)], 2)
    return replace(run, windows=windows)


@pytest.mark.parametrize("by_lengths", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_of_a_packed_row_sum_to_its_loss_and_gradients(by_lengths: bool, parts: int) -> None:
    model = adapted_llama(torch.float64)
    if by_lengths:
        assert use_packed_attention(model)
    task, row = CausalLM.for_model(model), packed_row(3)
    pieces = cut_rows(row, parts)
    starts = [int(piece["position_ids"][0, 0]) for piece in pieces]
    assert starts == [0] * {2: 2, 3: 3, 8: 5}[parts]
    found = []
    for batches in ([row], pieces):
        model.zero_grad()
        prepared = [task.prepare(one) for one in batches]
        losses = [task.loss_sum(model, one) for one in prepared]
        for loss in losses:
            loss.backward()
        weight = sum(task.loss_weight(one) for one in prepared)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((weight, sum(loss.detach() for loss in losses), gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)


def test_a_packed_row_out_of_memory_is_cut_between_its_examples(tmp_path: Path) -> None:
    roomy, tight = adapted_llama(), adapted_llama()
    run_training(packed_run(tmp_path / "a", roomy), replace(PLAN, total_steps=2))
    tight.model.norm = SmallRow(tight.model.norm, rows=10)
    lines: list[str] = []
    outcome = run_training(packed_run(tmp_path / "b", tight, lines), replace(PLAN, total_steps=2))
    assert outcome.micro_batch_parts == 4
    assert "29 packed tokens at a time" in " ".join(" ".join(lines).split())
    expected, got = trained_values(roomy), trained_values(tight)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)


def test_a_packed_row_is_refused_by_its_longest_example_alone(tmp_path: Path) -> None:
    model = adapted_llama()
    model.model.norm = SmallRow(model.model.norm, rows=8)
    with pytest.raises(UserError, match=r"single sequence of 9 tokens.*data\.max_seq_len"):
        run_training(packed_run(tmp_path, model), replace(PLAN, total_steps=2))


def test_a_resumed_run_keeps_the_smaller_micro_batch(tmp_path: Path) -> None:
    tight = adapted_llama()
    tight.model.norm = SmallMemory(tight.model.norm, rows=1)
    run_training(make_run(tmp_path, tight, total_steps=4), PLAN)
    again = adapted_llama()
    again.model.norm = SmallMemory(again.model.norm, rows=1)
    longer = TrainingPlan(total_steps=6, learning_rate=1e-2, seed=1)
    assert run_training(make_run(tmp_path, again, total_steps=6), longer).micro_batch_parts == 2
    assert again.model.norm.refusals == 0


def test_out_of_memory_in_the_update_is_not_tried_again_and_its_half_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    run = make_run(tmp_path, model := adapted_llama(), total_steps=4, lines=lines)
    run = replace(run, optimizer=optimizer_for(model, group_bytes=0))  # one update a parameter
    update, left = run.optimizer._update, len(run.optimizer.parameters) + 3

    def fail_in_the_second_step(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        update(*args)

    monkeypatch.setattr(run.optimizer, "_update", fail_in_the_second_step)
    with pytest.raises(UserError, match="in the optimizer's update"):
        run_training(run, TrainingPlan(total_steps=4, learning_rate=1e-2, save_every_steps=1))
    assert "the last saved state stands (of step 1)" in "\n".join(lines)
    assert [entry.name for entry in (tmp_path / "states").iterdir()] == ["step-00000001"]


class Overflowing(nn.Module):
    """A norm whose backward overflows fp16 whenever the gradient that comes in is large."""

    def __init__(self, inner: nn.Module, limit: float) -> None:
        super().__init__()
        self.inner, self.limit = inner, limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        if x.requires_grad:
            x.register_hook(self.overflow)
        y: torch.Tensor = self.inner(x)
        return y

    def overflow(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if gradient.abs().max() > self.limit else gradient


def fp16_llama(limit: float) -> Any:
    model = adapted_llama(torch.float16, adapter_dtype=torch.float32)
    model.model.norm = Overflowing(model.model.norm, limit)
    return model


def test_fp16_trains_close_to_fp32_under_the_loss_scaler(tmp_path: Path) -> None:
    exact = adapted_llama()
    a = run_training(make_run(tmp_path / "a", exact, total_steps=10), plan(10))
    half = adapted_llama(torch.float16, adapter_dtype=torch.float32)
    b = run_training(make_run(tmp_path / "b", half, total_steps=10, scaler=LossScaler()), plan(10))
    assert a.complete
    assert b.complete
    for x, y in zip(
        read_metrics(tmp_path / "a/metrics.jsonl"),
        read_metrics(tmp_path / "b/metrics.jsonl"),
        strict=True,
    ):
        assert y["loss"] == pytest.approx(x["loss"], rel=5e-3)


def plan(total: int) -> TrainingPlan:
    return TrainingPlan(total_steps=total, learning_rate=1e-2, seed=1)


def test_an_overflow_halves_the_scale_and_moves_neither_schedule_nor_adapters(
    tmp_path: Path,
) -> None:
    calm = adapted_llama(torch.float16, adapter_dtype=torch.float32)
    run_training(
        make_run(tmp_path / "a", calm, total_steps=5, scaler=LossScaler(scale=64.0)), plan(5)
    )
    wild = fp16_llama(limit=1.0)
    scaler = LossScaler(scale=2.0**16)
    outcome = run_training(make_run(tmp_path / "b", wild, total_steps=5, scaler=scaler), plan(5))
    assert outcome.step == 5
    assert outcome.overflows >= 3
    assert scaler.scale == 2.0**16 / 2**outcome.overflows
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("a", "b"))
    assert [r["learning_rate"] for r in a] == [r["learning_rate"] for r in b]
    assert [r["step"] for r in b] == [1, 2, 3, 4, 5]
    for x, y in zip(a, b, strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=5e-3)


def test_the_loss_scale_is_saved_and_resumed(tmp_path: Path) -> None:
    schedule = TrainingPlan(total_steps=5, learning_rate=1e-2, seed=1, schedule="constant")
    longer = TrainingPlan(total_steps=8, learning_rate=1e-2, seed=1, schedule="constant")
    for total, use in ((5, schedule), (8, longer)):
        scaler = LossScaler(scale=2.0**12, growth_interval=3)
        parted = fp16_llama(limit=8.0)
        run_training(make_run(tmp_path / "b", parted, total_steps=total, scaler=scaler), use)
    again_scaler = LossScaler(scale=2.0**12, growth_interval=3)
    again = fp16_llama(limit=8.0)
    run_training(make_run(tmp_path / "c", again, total_steps=8, scaler=again_scaler), longer)
    assert scaler.state() == again_scaler.state()
    assert all(torch.equal(v, trained_values(again)[n]) for n, v in trained_values(parted).items())


def test_a_model_that_overflows_at_every_scale_stops_with_a_way_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, fp16_llama(limit=0.0), total_steps=2, scaler=LossScaler())
    with pytest.raises(UserError, match="overflow at every loss scale"):
        run_training(run, plan(2))


def test_an_infinite_gradient_without_a_scaler_stops_with_the_batch_kept(tmp_path: Path) -> None:
    model = adapted_llama()
    model.model.norm = Overflowing(model.model.norm, limit=0.0)
    with pytest.raises(UserError, match=r"the gradient is (nan|inf); nothing was updated"):
        run_training(make_run(tmp_path, model, total_steps=2), plan(2))
    assert (tmp_path / "failed-batch" / "batch.safetensors").is_file()


def test_the_scale_doubles_after_its_interval() -> None:
    scaler = LossScaler(scale=4.0, growth_interval=2)
    for _ in range(4):
        scaler.applied()
    assert scaler.scale == 16.0
    scaler.overflowed()
    assert (scaler.scale, scaler.good_steps) == (8.0, 0)
