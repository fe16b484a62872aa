"""A run that is killed again and again ends with the bits of a run that never was.

Real processes, the real small model in NF4. SIGKILL comes a random moment after a new state stands:
in the middle of a step, of an evaluation, of the next save. Dropout is on, so random states are
part of the claim.
"""

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora_trainer.cli.options import STOPPED
from qlora_trainer.training.log import read_metrics

STEPS = 8
STEPS_OF_EPOCH = 5  # 20 training rows, 4 a step
KILLS = 3


@pytest.fixture(scope="module")
def start(
    smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], subprocess.Popen[str]]:
    """Starts a run of a few steps in a folder: two epochs, accumulation, evaluation, dropout."""
    place = tmp_path_factory.mktemp("exact-resume")
    rows = [
        {"prompt": f"{a} plus {b} is", "completion": f" {a + b}."}
        for a, b in zip(range(3, 25), range(40, 18, -1), strict=True)
    ]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = f"""
model: {{source: {smollm2}, device: cpu}}
adapter: {{rank: 4, dropout: 0.1, layers: {{last: 6}}}}
data: {{train: {place}/rows.jsonl, eval_fraction: 0.1, max_seq_len: 64,
        cache_folder: {place}/cache}}
train: {{max_steps: {STEPS}, micro_batch_size: 2, gradient_accumulation_steps: 2,
         learning_rate: 1e-3}}
evaluation: {{every_steps: 4}}
output: {{folder: {place}/unset, save_every_steps: 1, keep_last: 2}}
"""
    (place / "run.yaml").write_text(run)
    command = [sys.executable, "-m", "qlora_trainer", "train", str(place / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def begin(folder: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "--set", f"output.folder={folder}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


@pytest.fixture(scope="module")
def calm(
    start: Callable[[Path], subprocess.Popen[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    _finish(start(folder))
    return folder


def _finish(process: subprocess.Popen[str], exit_code: int = 0) -> str:
    """Wait for the end; what was said on the way."""
    _, said = process.communicate(timeout=600)
    assert process.returncode == exit_code, said
    return said


def _wait_for_a_new_state(process: subprocess.Popen[str], folder: Path, before: int) -> int:
    """Step of the first state newer than `before`."""
    while process.poll() is None:
        if (newest := _newest_state(folder)) > before:
            return newest
        time.sleep(0.005)
    raise AssertionError(f"the run ended before it could be killed: {process.communicate()[1]}")


def _newest_state(folder: Path) -> int:
    found = [path.name for path in folder.glob("states/step-*") if path.is_dir()]
    return max((int(name.removeprefix("step-")) for name in found), default=0)


def _resumed_after(said: str) -> int | None:
    match = re.search(r"resuming after step (\d+) of", said)
    return int(match.group(1)) if match else None


def _assert_same_run(calm: Path, other: Path) -> None:
    for name in ("adapter", "adapter-last"):
        ours, theirs = calm / name, other / name
        assert ours.exists() == theirs.exists()
        if not ours.exists():
            continue
        expected = load_file(ours / "adapter_model.safetensors")
        found = load_file(theirs / "adapter_model.safetensors")
        assert expected.keys() == found.keys()
        assert [key for key in expected if not expected[key].equal(found[key])] == []
    kept = ("kind", "step", "loss", "gradient_norm", "eval_loss")
    lines = [
        [{name: line.get(name) for name in kept} for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (calm, other)
    ]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(
    start: Callable[[Path], subprocess.Popen[str]], calm: Path, tmp_path: Path
) -> None:
    steps = [line for line in read_metrics(calm / "metrics.jsonl") if line["kind"] == "train"]
    step_seconds = statistics.median(line["seconds"] for line in steps)
    moments = random.Random(20261121)
    folder, saved = tmp_path / "killed", 0
    seen_before_kill: list[int] = []
    for _ in range(KILLS):
        process = start(folder)
        seen_before_kill.append(_wait_for_a_new_state(process, folder, saved))
        time.sleep(moments.uniform(0.0, 1.2) * step_seconds)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, said
        assert _resumed_after(said) == (saved or None), said
        saved = _newest_state(folder)
    assert any(step % STEPS_OF_EPOCH for step in seen_before_kill)
    assert saved < STEPS, "killed only after the end: nothing is left to go on with"
    assert _resumed_after(_finish(start(folder))) == saved
    _assert_same_run(calm, folder)


@pytest.mark.slow
def test_a_terminated_run_saves_and_goes_on_with_the_same_bits(
    start: Callable[[Path], subprocess.Popen[str]], calm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    process = start(folder)
    _wait_for_a_new_state(process, folder, 0)
    process.send_signal(signal.SIGTERM)
    _finish(process, exit_code=STOPPED)
    assert not (folder / "result.json").exists()
    saved = _newest_state(folder)
    assert _resumed_after(_finish(start(folder))) == saved
    _assert_same_run(calm, folder)
