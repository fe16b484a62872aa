"""Chaos in short: a real run is killed, and its newest state is damaged."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.run.conftest import tiny_model, tiny_run

__all__ = ["tiny_model"]  # pytest finds fixtures by their names here

CHAOS = Path(__file__).resolve().parents[2] / "scripts" / "chaos.py"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals and mounts of Unix")
def test_no_fault_costs_a_saved_step_or_a_bit(tiny_model: Path, tmp_path: Path) -> None:
    run = tiny_run(
        tiny_model,
        tmp_path,
        adapter={"dropout": 0.1},
        train={"max_steps": 40, "micro_batch_size": 2},
        output={"save_every_steps": 3},
    )
    file, report = tmp_path / "run.yaml", tmp_path / "chaos.json"
    file.write_text(yaml.safe_dump(run.model_dump(mode="json", exclude={"output": {"folder"}})))
    words = [sys.executable, str(CHAOS), str(file), "--minutes", "0", "--json", str(report),
             "--only", "kill,corrupted-state"]  # fmt: skip
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as chaos:
        try:
            said = chaos.communicate(timeout=500)[0]
        except BaseException:  # the runs it started hold the pipe, and would outlive it
            os.killpg(chaos.pid, signal.SIGKILL)
            raise
    assert chaos.returncode == 0, said[-4000:]
    told = json.loads(report.read_text())
    assert told["bits_different"] == 0
    assert told["bits_compared"] > 0
    assert told["resumes"] >= 1
    assert told["skipped"] == {}
    assert set(told["faults"]) == {"kill", "corrupted-state"}
    for kind, tally in told["faults"].items():
        assert tally["injected"] == tally["survived"] >= 1, kind
        assert tally["most_steps_lost"] <= (6 if kind == "corrupted-state" else 4), kind
