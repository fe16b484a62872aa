"""Windows made a step ahead: the same ones in the same order, and no thread that stays."""

import signal
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.errors import UserError
from qlora_trainer.training.ahead import WindowsAhead
from qlora_trainer.training.log import read_metrics
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.plan import TrainingPlan
from qlora_trainer.training.windows import Windows
from tests.training.test_loop import StopAt
from tests.training.tiny import (
    Epoch,
    adapted_llama,
    after_step,
    held_out,
    make_run,
    trained_values,
)

SOON = 30.0  # seconds, for what happens at once
PLAN = TrainingPlan(total_steps=5, learning_rate=1e-2, seed=5, evaluate_every_steps=2)


@pytest.fixture(autouse=True)
def no_thread_is_left_over() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def tagged(step: int) -> Any:
    return [{"input_ids": torch.tensor([[step]])}]


class Made:
    """Makes windows that tell their step; remembers which, and lets others wait for one."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._done = threading.Condition()

    def __call__(self, step: int) -> Any:
        with self._done:
            self.steps.append(step)
            self._done.notify_all()
        return tagged(step)

    def wait_for(self, step: int) -> bool:
        with self._done:
            return self._done.wait_for(lambda: step in self.steps, SOON)


def test_windows_come_in_order_each_made_once_and_none_beyond_the_end() -> None:
    windows, steps = Windows(lambda epoch: Epoch(epoch, 5, 2), 2), list(range(7))
    made: list[int] = []

    def make(step: int) -> Any:
        made.append(step)
        return windows.window(step)

    with WindowsAhead(make, stop=7) as ahead:
        got = [ahead.window(step) for step in steps]
        ahead.rest()
    assert made == steps
    for step in steps:
        expected = windows.window(step)
        assert len(got[step]) == len(expected)
        for ours, theirs in zip(got[step], expected, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_next_window_is_made_while_this_one_is_used_and_no_other() -> None:
    made = Made()
    with WindowsAhead(made, stop=9) as ahead:
        ahead.window(3)
        assert made.wait_for(4)
        ahead.rest()
        assert made.steps == [3, 4]
        assert ahead.window(4)[0]["input_ids"].item() == 4
        assert made.wait_for(5)


def test_a_step_that_was_not_expected_is_made_all_the_same() -> None:
    with WindowsAhead(tagged, stop=9) as ahead:
        found = [ahead.window(step)[0]["input_ids"].item() for step in (0, 5, 6, 2)]
    assert found == [0, 5, 6, 2]


@pytest.mark.parametrize("error", [UserError("a picture is gone"), KeyboardInterrupt()])
def test_what_fails_is_raised_at_its_own_step_with_where_it_failed(error: BaseException) -> None:
    def broken(step: int) -> Any:
        if step == 2:
            raise error
        return tagged(step)

    with WindowsAhead(broken, stop=9) as ahead:
        assert [ahead.window(step)[0]["input_ids"].item() for step in (0, 1)] == [0, 1]
        ahead.rest()
        with pytest.raises(type(error)) as caught:
            ahead.window(2)
    assert caught.value is error
    assert "broken" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_who_leaves_early_takes_the_thread_along() -> None:
    begun = threading.Event()

    def slow(step: int) -> Any:
        if step == 1:
            begun.set()
            time.sleep(0.3)
        return tagged(step)

    with WindowsAhead(slow, stop=9) as ahead:
        ahead.window(0)
        assert begun.wait(SOON)
    assert [thread for thread in threading.enumerate() if "windows" in thread.name] == []
    with pytest.raises(RuntimeError, match="after shutdown"):
        ahead.window(1)


def all_made(folder: Path, **parts: Any) -> tuple[list[int], Any, dict[str, torch.Tensor]]:
    """A run of `PLAN`: which windows were made by which thread, and how it ended."""
    model = adapted_llama(dropout=0.2)
    run = make_run(folder, model, total_steps=5, **parts)
    window, made = run.windows.window, list[int]()

    def make(step: int) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        made.append(step)
        return window(step)

    run.windows.window = make  # type: ignore[method-assign]
    outcome = run_training(run, PLAN)
    return made, outcome, trained_values(model)


def test_a_run_trains_on_each_window_once_and_a_resumed_one_makes_its_own_anew(
    tmp_path: Path,
) -> None:
    made, _, whole = all_made(tmp_path / "a", eval_batches=held_out())
    assert made == [0, 1, 2, 3, 4]
    stop = held_out(StopAt(signal.SIGTERM, evaluation=1))
    made, outcome, _ = all_made(tmp_path / "b", eval_batches=stop)
    assert (outcome.step, made) == (2, [0, 1, 2])
    made, outcome, resumed = all_made(tmp_path / "b", eval_batches=held_out())
    assert (outcome.complete, made) == (True, [2, 3, 4])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_nothing_is_in_the_making_while_held_out_rows_are_read(tmp_path: Path) -> None:
    model, making, seen = adapted_llama(), threading.Event(), list[bool]()
    run = make_run(
        tmp_path, model, total_steps=5, eval_batches=held_out(lambda: seen.append(making.is_set()))
    )
    window = run.windows.window

    def slow(step: int) -> Any:
        making.set()
        time.sleep(0.2)
        made = window(step)
        making.clear()
        return made

    run.windows.window = slow  # type: ignore[method-assign]
    run_training(run, PLAN)
    assert seen == [False] * 4


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_picture_lost_midway_fails_its_step_and_none_before_it(tmp_path: Path, step: int) -> None:
    run = make_run(tmp_path, adapted_llama(), total_steps=5)
    window = run.windows.window

    def lost(number: int) -> Any:
        if number == step:
            raise UserError("the picture 7.png is not there")
        return window(number)

    run.windows.window = lost  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"7\.png"):
        run_training(run, TrainingPlan(total_steps=5, learning_rate=1e-2, seed=5))
    lines = tmp_path / "metrics.jsonl"
    found = [line["step"] for line in read_metrics(lines)] if lines.exists() else []
    assert found == list(range(1, step + 1))
    state = tmp_path / "states" / f"step-{step:08d}"
    assert state.is_dir() == (step > 0)


def test_a_second_ctrl_c_leaves_with_the_thread(tmp_path: Path) -> None:
    run = make_run(tmp_path, adapted_llama(), total_steps=5)

    def twice() -> None:
        for _ in range(2):
            StopAt(signal.SIGINT, evaluation=0)()

    after_step(run, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        run_training(run, PLAN)
