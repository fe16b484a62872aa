import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = Path(__file__).parent / "measurements"


def validate(tmp_path, file, rows):
    target = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "validate_memory.py"), str(MEASUREMENTS / file),
         "--rows", rows, "--json", str(target), "--processes", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_t4_rows_are_predicted_to_a_fraction_of_a_percent(tmp_path):
    found = validate(tmp_path, "t4_peft_training_steps.csv", "14,15")
    summary = found["summary"]
    assert summary["allocated_mean_abs_error"] <= 0.0015
    assert summary["allocated_worst_error"] <= 0.005
    assert summary["reserved_worst_error"] <= 0.06
    assert summary["reserved_worst_under"] >= -0.04
    full_precision = found["rows"][1]
    for name in ("allocated", "reserved", "after_load", "forward", "backward", "optimizer"):
        assert full_precision[f"predicted_{name}_bytes"] == full_precision[f"measured_{name}_bytes"]


@pytest.mark.slow
def test_an_a100_and_an_l40s_row_are_within_their_bound(tmp_path):
    a100 = validate(tmp_path, "a100_mistral_lora_steps.csv", "4")["summary"]
    l40s = validate(tmp_path, "l40s_peft_methods.csv", "0")["summary"]
    assert a100["allocated_worst_error"] <= 0.015
    assert l40s["reserved_worst_error"] <= 0.015
