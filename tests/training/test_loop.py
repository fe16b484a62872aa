import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.errors import UserError
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.training.log import read_metrics
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.plan import TrainingPlan
from tests.training.tiny import adapted_llama, after_step, held_out, make_run, trained_values


def plan(total_steps: int, **settings: object) -> TrainingPlan:
    return TrainingPlan(total_steps=total_steps, learning_rate=1e-2, seed=5, **settings)  # type: ignore[arg-type]


class StopAt:
    """Asks the process to stop as an evaluation begins, as Ctrl-C or a scheduler's SIGTERM does."""

    def __init__(self, number: int, *, evaluation: int) -> None:
        self.number, self.left = number, evaluation

    def __call__(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        self.left -= 1


class Scored:
    """The task with one more metric, whose value at each evaluation is given."""

    def __init__(self, task: Any, values: list[float]) -> None:
        self._task, self._values, self._value = task, iter(values), 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def next_value(self) -> None:
        self._value = next(self._values)

    def evaluate(self, model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        score = torch.tensor(self._value * self._task.loss_weight(batch))
        return {**self._task.evaluate(model, batch), "score": score}


def test_training_learns_and_leaves_adapter_metrics_and_state(tmp_path: Path) -> None:
    model = adapted_llama()
    run = make_run(tmp_path, model, total_steps=40, eval_batches=held_out())
    outcome = run_training(run, plan(40, evaluate_every_steps=10, save_every_steps=10))
    records = read_metrics(tmp_path / "metrics.jsonl")
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    assert outcome.complete
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 10, 20, 30, 40]
    assert (tmp_path / "adapter" / "adapter.pt").is_file()
    assert sorted(p.name for p in (tmp_path / "states").iterdir()) == [
        "step-00000030",
        "step-00000040",
    ]


@pytest.mark.parametrize("kind", ["paged_adamw_32bit", "adamw_8bit", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_run_stopped_inside_an_epoch_resumes_bit_for_bit(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    settings = {"evaluate_every_steps": 3, "save_every_steps": 2}
    whole = adapted_llama(dtype, dropout=0.2)
    run_training(
        make_run(tmp_path / "a", whole, total_steps=11, kind=kind, eval_batches=held_out()),  # type: ignore[arg-type]
        plan(11, **settings),
    )
    parted = adapted_llama(dtype, dropout=0.2)
    first = make_run(
        tmp_path / "b",
        parted,
        total_steps=11,
        kind=kind,  # type: ignore[arg-type]
        eval_batches=held_out(StopAt(signal.SIGTERM, evaluation=1)),
    )
    outcome = run_training(first, plan(11, **settings))
    assert not outcome.complete
    assert outcome.step == 3
    torch.manual_seed(123)  # whatever the new process happened to draw
    resumed = adapted_llama(dtype, dropout=0.2)
    lines: list[str] = []
    again = make_run(
        tmp_path / "b",
        resumed,
        total_steps=11,
        kind=kind,  # type: ignore[arg-type]
        eval_batches=held_out(),
        lines=lines,
    )
    assert run_training(again, plan(11, **settings)).complete
    assert "resuming after step 3 of 11" in "\n".join(lines)
    expected, got = trained_values(whole), trained_values(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    a, b = (
        [
            {k: v for k, v in r.items() if k in ("kind", "step", "loss", "eval_loss")}
            for r in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("a", "b")
    )
    assert a == b


def test_steps_past_the_last_save_are_made_again_and_logged_once(tmp_path: Path) -> None:
    model = adapted_llama()
    run_training(make_run(tmp_path, model, total_steps=6), plan(6, save_every_steps=4))
    expected = trained_values(model)
    newest = tmp_path / "states" / "step-00000006"
    (newest / "optimizer.safetensors").write_bytes(b"torn")
    lines: list[str] = []
    again = adapted_llama()
    outcome = run_training(make_run(tmp_path, again, total_steps=6, lines=lines), plan(6))
    assert "damaged" in "\n".join(lines)
    assert outcome.complete
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(v, trained_values(again)[k]) for k, v in expected.items())


def test_other_training_data_are_refused_on_resume(tmp_path: Path) -> None:
    run_training(make_run(tmp_path, adapted_llama(), total_steps=2), plan(2))
    other = make_run(
        tmp_path, adapted_llama(), total_steps=4, identity={"data_fingerprint": "other"}
    )
    with pytest.raises(UserError, match=r"the training data .* have changed"):
        run_training(other, plan(4))


def test_a_run_stopped_before_its_first_step_begins_there(tmp_path: Path) -> None:
    stopped = make_run(
        tmp_path,
        adapted_llama(),
        total_steps=3,
        eval_batches=held_out(StopAt(signal.SIGTERM, evaluation=0)),
    )
    assert run_training(stopped, plan(3)).step == 0
    again = make_run(tmp_path, adapted_llama(), total_steps=3, eval_batches=held_out())
    outcome = run_training(again, plan(3))
    assert (outcome.step, outcome.complete) == (3, True)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["kind"], r["step"]) for r in records] == [
        ("eval", 0),
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("eval", 3),
    ]


def test_early_stopping_keeps_the_best_adapter_and_stays_stopped(tmp_path: Path) -> None:
    model = adapted_llama()
    seen: list[dict[str, torch.Tensor]] = []
    task = Scored(CausalLM.for_model(model), [9.0, 3.0, 2.0, 2.5, 2.4, 2.3])

    def begin() -> None:
        seen.append(trained_values(model))
        task.next_value()

    run = make_run(tmp_path, model, total_steps=20, eval_batches=held_out(begin))
    run = replace(run, task=task)
    stop = plan(20, evaluate_every_steps=2, patience=2, best_metric="score")
    outcome = run_training(run, stop)
    assert (outcome.step, outcome.best_step, outcome.best_value) == (8, 4, 2.0)
    assert outcome.reason == "stopped early"
    best = torch.load(tmp_path / "adapter" / "adapter.pt")
    assert all(torch.equal(best[name], seen[2][name]) for name in best)
    last = torch.load(tmp_path / "adapter-last" / "adapter.pt")
    assert all(torch.equal(last[name], trained_values(model)[name]) for name in last)
    again = make_run(tmp_path, adapted_llama(), total_steps=20, eval_batches=held_out())
    assert run_training(again, stop).step == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_leaves_cleanly_and_gives_the_handler_back(
    tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    lines: list[str] = []
    run = make_run(
        tmp_path,
        adapted_llama(),
        total_steps=9,
        eval_batches=held_out(StopAt(number, evaluation=1)),
        lines=lines,
    )
    outcome = run_training(run, plan(9, evaluate_every_steps=4))
    assert (outcome.step, outcome.complete) == (4, False)
    assert number.name in outcome.reason
    assert (tmp_path / "states" / "step-00000004" / "manifest.json").is_file()
    assert signal.getsignal(number) is before
    assert any(number.name in line for line in lines)


def test_loss_that_is_not_finite_stops_with_the_batch_kept(tmp_path: Path) -> None:
    model = adapted_llama()
    run = make_run(
        tmp_path, model, total_steps=5, decode=lambda ids: " ".join(map(str, ids)), accumulation=1
    )
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    before = trained_values(model)
    with pytest.raises(UserError, match=r"step 0: the loss is nan.*failed-batch"):
        run_training(run, plan(5))
    assert all(torch.equal(v, trained_values(model)[k]) for k, v in before.items())
    text = (tmp_path / "failed-batch" / "batch.txt").read_text()
    first = run.windows.window(0)[0]["input_ids"][0].tolist()
    assert text.startswith(" ".join(map(str, first)))
    assert (tmp_path / "failed-batch" / "batch.safetensors").is_file()


def test_state_says_where_the_run_stands(tmp_path: Path) -> None:
    run_training(make_run(tmp_path, adapted_llama(), total_steps=5), plan(5))
    trainer = json.loads((tmp_path / "states/step-00000005/trainer.json").read_text())
    assert trainer["course"]["step"] == 5
    assert trainer["epoch"] == pytest.approx(1 + 2 / 7, abs=1e-4)
    assert trainer["identity"] == {"data_fingerprint": "tiny"}


def test_bf16_adapters_reach_the_loss_of_fp32_adapters(tmp_path: Path) -> None:
    final = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = adapted_llama(torch.bfloat16, adapter_dtype=dtype)
        run = make_run(tmp_path / name, model, total_steps=60, eval_batches=held_out())
        outcome = run_training(run, plan(60))
        assert outcome.last_evaluation is not None
        final[name] = outcome.last_evaluation["loss"]
        assert final[name] < 0.97 * read_metrics(tmp_path / name / "metrics.jsonl")[0]["eval_loss"]
    assert final["bf16"] == pytest.approx(final["fp32"], rel=5e-3)


@pytest.mark.parametrize("thing", ["base_fingerprint", "eval_fingerprint"])
def test_another_base_or_other_held_out_rows_are_refused_on_resume(
    tmp_path: Path, thing: str
) -> None:
    known = {"data_fingerprint": "tiny", "base_fingerprint": "b", "eval_fingerprint": "e"}
    run_training(make_run(tmp_path, adapted_llama(), total_steps=2, identity=known), plan(2))
    other = make_run(tmp_path, adapted_llama(), total_steps=4, identity=known | {thing: "other"})
    with pytest.raises(UserError, match=r"1 fault.*\n.*(base model's files|held-out data.*) have"):
        run_training(other, plan(4))


class FailAt:
    """Fails once as an evaluation begins, as a full card or a broken disk does."""

    def __init__(self, evaluation: int, error: Exception) -> None:
        self.left, self.error = evaluation, error

    def __call__(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise self.error


def evaluated_steps(folder: Path) -> list[int]:
    return [r["step"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "eval"]


@pytest.mark.parametrize("evaluation", [1, 2], ids=["midway", "last"])
def test_a_failed_evaluation_loses_no_step_and_is_made_up_for(
    tmp_path: Path, evaluation: int
) -> None:
    whole = adapted_llama()
    run = make_run(tmp_path / "a", whole, total_steps=5, eval_batches=held_out())
    expected = run_training(run, plan(5, evaluate_every_steps=3))
    lines: list[str] = []
    failing = make_run(
        tmp_path / "b",
        adapted_llama(),
        total_steps=5,
        eval_batches=held_out(FailAt(evaluation, RuntimeError("the card fell off"))),
        lines=lines,
    )
    with pytest.raises(RuntimeError, match="the card fell off"):
        run_training(failing, plan(5, evaluate_every_steps=3))
    step = (3, 5)[evaluation - 1]
    assert f"the state after step {step} is saved" in "\n".join(lines)
    model = adapted_llama()
    again = make_run(tmp_path / "b", model, total_steps=5, eval_batches=held_out())
    assert run_training(again, plan(5, evaluate_every_steps=3)) == expected
    assert evaluated_steps(tmp_path / "b") == [0, 3, 5]
    assert all(torch.equal(v, trained_values(model)[k]) for k, v in trained_values(whole).items())


def test_the_last_state_stands_before_the_last_evaluation_begins(tmp_path: Path) -> None:
    stood: list[bool] = []

    def look() -> None:
        stood.append((tmp_path / "states" / "step-00000003" / "manifest.json").is_file())

    run = make_run(tmp_path, adapted_llama(), total_steps=3, eval_batches=held_out(look))
    run_training(run, plan(3))
    assert stood == [False, True]
    trainer = json.loads((tmp_path / "states/step-00000003/trainer.json").read_text())
    assert trainer["course"]["last_evaluation_step"] == 3


def test_a_kill_before_the_first_save_leaves_one_first_evaluation(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die() -> list[dict[str, torch.Tensor]]:
        raise Killed

    run = make_run(tmp_path, adapted_llama(), total_steps=2, eval_batches=held_out())
    run.windows.window = lambda step: die()  # type: ignore[method-assign, assignment]
    with pytest.raises(Killed):
        run_training(run, plan(2))
    assert evaluated_steps(tmp_path) == [0]
    again = make_run(tmp_path, adapted_llama(), total_steps=2, eval_batches=held_out())
    run_training(again, plan(2))
    assert evaluated_steps(tmp_path) == [0, 2]


def test_a_loss_that_turns_bad_keeps_the_steps_before_it(tmp_path: Path) -> None:
    model = adapted_llama()
    lines: list[str] = []
    run = make_run(tmp_path, model, total_steps=4, lines=lines)

    def spoil() -> None:
        with torch.no_grad():
            model.lm_head.weight[3] = float("nan")

    after_step(run, 2, spoil)
    with pytest.raises(UserError, match="step 2: the loss is nan"):
        run_training(run, plan(4))
    assert "the state after step 2 is saved" in "\n".join(lines)
    model = adapted_llama()
    assert run_training(make_run(tmp_path, model, total_steps=4), plan(4)).complete
    whole = adapted_llama()
    run_training(make_run(tmp_path / "whole", whole, total_steps=4), plan(4))
    assert all(torch.equal(v, trained_values(model)[k]) for k, v in trained_values(whole).items())


def test_an_adapter_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    run = make_run(tmp_path, adapted_llama(), total_steps=2, eval_batches=held_out())
    object.__setattr__(run, "save_adapter", full)
    with pytest.raises(UserError, match=r"/adapter: .*No space left on device.*states are unt"):
        run_training(run, plan(2))
    again = make_run(tmp_path, adapted_llama(), total_steps=2, eval_batches=held_out())
    outcome = run_training(again, plan(2))
    assert outcome.best_step == 2
    assert (tmp_path / "adapter" / "adapter.pt").is_file()


@pytest.mark.parametrize(
    ("save_every_seconds", "saves"), [(1e-9, [4, 3, 2, 1]), (1e9, [2, 2, 1, 1])]
)
def test_the_remaining_time_counts_saves_by_steps_and_by_the_clock(
    tmp_path: Path, save_every_seconds: float, saves: list[int]
) -> None:
    run = make_run(tmp_path, adapted_llama(), total_steps=4)
    counted: list[int] = []
    step = run.log.step

    def count(values: Any, counts_left: Any) -> None:
        counted.append(counts_left["save"])
        step(values, counts_left)

    run.log.step = count  # type: ignore[method-assign]
    run_training(run, plan(4, save_every_steps=3, save_every_seconds=save_every_seconds))
    assert counted == saves


def test_however_few_steps_it_takes_the_state_is_saved_in_time(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    run = make_run(tmp_path, adapted_llama(), total_steps=4)
    window = run.windows.window

    def until_killed(step: int) -> list[dict[str, torch.Tensor]]:
        if step == 2:
            raise Killed
        return window(step)

    run.windows.window = until_killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run_training(run, plan(4, save_every_seconds=1e-9))
    assert (tmp_path / "states" / "step-00000002" / "manifest.json").is_file()
