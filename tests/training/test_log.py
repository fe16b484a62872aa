import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from qlora_trainer.errors import UserError
from qlora_trainer.training.curve import draw_losses
from qlora_trainer.training.log import Remaining, RunLog, cut_metrics, read_metrics
from qlora_trainer.training.trackers import open_trackers


def values(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1.0 / step, "tokens_per_second": 1234.5}


def log_to(file: Path, *, terminal: bool = False, **settings: Any) -> tuple[RunLog, io.StringIO]:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120)
    return RunLog(file, total_steps=40, console=console, **settings), shown


def test_without_a_terminal_there_are_lines_and_no_bar(tmp_path: Path) -> None:
    log, shown = log_to(tmp_path / "m.jsonl")
    with log:
        log.begin(0)
        for step in range(1, 41):
            log.step(values(step), {"step": 40 - step})
    lines = shown.getvalue().splitlines()
    assert 20 <= len(lines) <= 22
    assert "\x1b" not in shown.getvalue()
    assert "step 40/40  loss 0.0250" in lines[-1]


def test_on_a_terminal_there_is_a_bar_with_loss_speed_memory_and_time(tmp_path: Path) -> None:
    log, shown = log_to(tmp_path / "m.jsonl", terminal=True)
    with log:
        log.begin(0)
        log.remaining.add("step", 2.0)
        log.step(values(4), {"step": 36})
    text = shown.getvalue()
    for expected in ("4/40", "loss 0.2500", "tokens/s", "iB", "1 min 12 s left"):
        assert expected in text


def test_remaining_time_counts_evaluations_and_saves_still_to_come() -> None:
    left = Remaining()
    assert left.seconds({"step": 3}) is None
    left.add("step", 1.0)
    assert left.seconds({"step": 100, "evaluate": 4, "save": 10}) == 100.0
    left.add("evaluate", 60.0)
    left.add("save", 2.0)
    assert left.seconds({"step": 100, "evaluate": 4, "save": 10}) == 360.0


def test_every_nth_step_and_the_last_are_written(tmp_path: Path) -> None:
    log, _ = log_to(tmp_path / "m.jsonl", every_steps=16)
    with log:
        log.begin(0)
        for step in range(1, 41):
            log.step(values(step), {"step": 40 - step})
    assert [r["step"] for r in read_metrics(tmp_path / "m.jsonl")] == [16, 32, 40]


def test_lines_past_the_resumed_step_and_torn_ones_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    whole = [json.dumps({"kind": "train", **values(step)}) for step in (1, 2, 3)]
    file.write_text("\n".join(whole) + '\n{"kind": "train", "st')
    assert [r["step"] for r in read_metrics(file)] == [1, 2, 3]
    cut_metrics(file, 2)
    assert file.read_text() == "\n".join(whole[:2]) + "\n"


def test_the_curve_is_a_picture_of_both_losses(tmp_path: Path) -> None:
    log, _ = log_to(tmp_path / "m.jsonl")
    with log:
        log.begin(0)
        for step in range(1, 41):
            log.step(values(step), {"step": 40 - step})
            if step % 10 == 0:
                log.evaluation(step, {"loss": 1.1 / step, "token_accuracy": 0.5, "tokens": 9.0})
    assert draw_losses(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    draw_losses(tmp_path / "m.jsonl", tmp_path / "both.png", unit="row", metric="token_accuracy")
    with Image.open(tmp_path / "loss.png") as one, Image.open(tmp_path / "both.png") as both:
        assert both.height > one.height, "the task's own metric stands below"
    assert not draw_losses(tmp_path / "none.jsonl", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    trackers = open_trackers(
        ["tensorboard"], tmp_path / "trackers", run_name="r", settings={"a.b": None, "c": 1}
    )
    log, _ = log_to(tmp_path / "m.jsonl", trackers=trackers)
    with log:
        log.begin(0)
        log.step(values(1), {"step": 39})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "trackers").rglob("events.*")).parent))
    events.Reload()
    assert events.Scalars("loss")[0].value == 1.0


def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"qlora-trainer\[nosuch\]"):
        open_trackers(["nosuch"], tmp_path, run_name="r", settings={})
