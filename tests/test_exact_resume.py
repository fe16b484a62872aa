"""A run that is killed again and again ends with the bits of a run that never was.

Real processes, the real small model in NF4, SIGKILL at moments drawn at random: in the middle of
loading, of a step, of a save. Dropout is on, so random states are part of the claim.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora_trainer.cli.app import STOPPED

STEPS = 10
SMALLEST_KILLS = 3


@pytest.fixture
def run_file(smollm2: Path, tmp_path: Path) -> Path:
    """A run of a few steps over a few rows: two epochs, accumulation, evaluation, dropout."""
    rows = [
        {"prompt": f"{a} plus {b} is", "completion": f" {a + b}."}
        for a, b in zip(range(3, 25), range(40, 18, -1), strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = f"""
model: {{source: {smollm2}, device: cpu}}
adapter: {{rank: 4, dropout: 0.1, layers: {{last: 6}}}}
data: {{train: {tmp_path}/rows.jsonl, eval_fraction: 0.1, max_seq_len: 64,
        cache_folder: {tmp_path}/cache}}
train: {{max_steps: {STEPS}, micro_batch_size: 2, gradient_accumulation_steps: 2,
         learning_rate: 1e-3}}
evaluation: {{every_steps: 4}}
output: {{folder: {tmp_path}/unset, save_every_steps: 1, keep_last: 2}}
"""
    path = tmp_path / "run.yaml"
    path.write_text(run)
    return path


def _start(run_file: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qlora_trainer", "train", str(run_file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, "--set", f"output.folder={folder}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _finish(process: subprocess.Popen[bytes], exit_code: int = 0) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == exit_code, errors.decode()


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(run_file: Path, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    started = time.monotonic()
    _finish(_start(run_file, calm))
    whole_run_seconds = time.monotonic() - started

    moments = random.Random(20261121)
    kills = 0
    while kills < SMALLEST_KILLS or not (killed / "states").is_dir():
        process = _start(run_file, killed)
        try:
            process.wait(timeout=moments.uniform(0.3, 0.95) * whole_run_seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        break
    if not (killed / "result.json").exists():
        _finish(_start(run_file, killed))

    assert kills >= 1
    for name in ("adapter", "adapter-last"):
        ours, theirs = calm / name, killed / name
        assert ours.exists() == theirs.exists()
        if not ours.exists():
            continue
        expected = load_file(ours / "adapter_model.safetensors")
        found = load_file(theirs / "adapter_model.safetensors")
        assert expected.keys() == found.keys()
        different = [key for key in expected if not expected[key].equal(found[key])]
        assert different == []
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_terminated_run_saves_and_goes_on_with_the_same_bits(
    run_file: Path, tmp_path: Path
) -> None:
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    _finish(_start(run_file, calm))
    process = _start(run_file, stopped)
    while process.poll() is None and not (stopped / "states").is_dir():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _finish(process, exit_code=STOPPED)
    assert not (stopped / "result.json").exists()
    _finish(_start(run_file, stopped))
    expected = load_file(calm / "adapter" / "adapter_model.safetensors")
    found = load_file(stopped / "adapter" / "adapter_model.safetensors")
    assert all(expected[key].equal(found[key]) for key in expected)
