import json
import sys

import pytest
from benchmark_quickstart import comparisons, training_figures
from exact_resume import kill_and_resume
from hypothesis import given
from hypothesis import strategies as st
from training_process import bits_different, steps_logged


@given(st.binary(min_size=1, max_size=40), st.data())
def test_every_flipped_bit_is_counted_once(content, data):
    flipped = data.draw(st.sets(st.integers(0, 8 * len(content) - 1)))
    other = bytearray(content)
    for bit in flipped:
        other[bit // 8] ^= 1 << bit % 8
    assert bits_different(content, bytes(other)) == len(flipped)


def test_a_line_cut_by_a_kill_is_no_step(tmp_path):
    assert steps_logged(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "seconds": 1.5}\n{"step": 4, "sec')
    assert steps_logged(tmp_path) == 3


# Counts to 12 in a file, one step at a time, and goes on from the number it finds there.
COUNTER = """
import json, pathlib, time
log = pathlib.Path("metrics.jsonl")
done = len(log.read_text().splitlines()) if log.exists() else 0
while done < 12:
    time.sleep(0.05)
    done += 1
    with log.open("a") as file:
        file.write(json.dumps({"step": done, "seconds": 0.05}) + chr(10))
"""


def test_a_process_is_killed_as_often_as_asked_and_still_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = kill_and_resume([sys.executable, "-c", COUNTER], tmp_path, kills=2, seed=1)
    assert report["kills"] == 2
    assert report["killed_after_step"] == sorted(report["killed_after_step"])
    assert steps_logged(tmp_path) == 12


def test_a_run_that_fails_by_itself_is_not_taken_for_a_kill(tmp_path):
    with pytest.raises(SystemExit, match="exit code 3"):
        kill_and_resume([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, kills=1, seed=0)


def test_comparisons_speak_only_of_the_parts_that_are_there():
    assert comparisons({}) == {}
    report = {"quickstart": {"loss": 0.2}, "fp32": {"loss": 0.25}}
    assert comparisons(report) == {"bf16_adapter_loss_over_fp32": 0.8}


def test_figures_are_read_from_a_run_folder(tmp_path):
    result = {"metrics": {"loss_before": 2.0, "loss": 0.5}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    rows = [
        {"kind": "eval", "step": 0, "eval_loss": 2.0},
        {"kind": "train", "step": 1, "loss": 1.5, "seconds": 2.0, "tokens": 100},
        {"kind": "train", "step": 2, "loss": 1.0, "seconds": 1.0, "tokens": 80},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    figures = training_figures(tmp_path)
    assert figures["training_losses"] == [1.5, 1.0]
    assert (figures["training_seconds"], figures["tokens"]) == (3.0, 180)
