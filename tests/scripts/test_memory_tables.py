"""What was recorded of foresight's accuracy, and what rows the validation takes."""

import csv
from typing import Any

import measured_rows
import pytest
from tables import memory
from tables.common import result

from tests.conftest import REPOSITORY

ROWS = REPOSITORY / "tests" / "memory" / "measurements" / "t4_peft_training_steps.csv"
BOUNDS = {
    "allocated_mean_abs_error": 0.0015,
    "allocated_worst_error": 0.005,
    "reserved_mean_abs_error": 0.02,
    "reserved_worst_error": 0.06,
    "after_load_mean_abs_error": 0.005,
    "forward_mean_abs_error": 0.005,
    "backward_mean_abs_error": 0.005,
    "optimizer_mean_abs_error": 0.005,
}


@pytest.fixture
def row() -> dict[str, str]:
    with ROWS.open(newline="", encoding="utf-8") as file:
        return next(csv.DictReader(file))


def test_what_was_recorded_is_within_its_bounds() -> None:
    found = result("memory-t4")
    with ROWS.open(encoding="utf-8") as file:
        assert len(found["rows"]) == len(file.readlines()) - 1
    assert not [r for r in found["rows"] if "error" in r]
    for name, bound in BOUNDS.items():
        assert found["summary"][name] <= bound
    assert found["summary"]["reserved_worst_under"] >= -0.04
    assert result("memory-a100")["summary"]["allocated_worst_error"] <= 0.015
    assert result("memory-l40s")["summary"]["reserved_worst_error"] <= 0.015
    cpu = [r for r in result("memory-cpu")["rows"] if r["settings"] == "nf4"]
    assert len(cpu) == 4
    assert max(abs(r["errors"]["allocated"]) for r in cpu) <= 0.005


def test_the_table_says_that_equal_loads_were_measured_unequal() -> None:
    told = memory.memory()
    assert "SmolLM2-360M, loaded alike, was measured once at 381.6 and once at 388.2 MiB" in told


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("quantization", "int8"),
        ("optimizer", "paged_adamw_8bit"),
        ("attn", "flash_attention_2"),
        ("lora_dtype", "float16"),
        ("compute_dtype", "fp8"),
        ("model_id", "EleutherAI/pythia-410m"),
        ("num_layers", "many"),
        ("gpu", "unknown"),
        ("gpu", "Tesla T4"),
    ],
)
def test_what_a_recipe_cannot_be_told_is_refused_by_name(
    row: dict[str, str], column: str, value: str
) -> None:
    with pytest.raises(measured_rows.NotCovered, match=column):
        measured_rows.request_for(row | {column: value})


def test_what_is_empty_is_taken_from_what_is_there(row: dict[str, str]) -> None:
    full: dict[str, Any] = measured_rows.request_for(row)["recipe"]["model"]
    some = measured_rows.request_for(row | {"head_dim": "", "cuda_context_mib": ""})
    assert some["recipe"]["model"] == full
    assert some["capacity_bytes"] == 14912 * 2**20
    told = measured_rows.measured_of(row | {"peak_reserved_mib": ""})
    assert "reserved" not in told
    assert "allocated" in told


def test_rows_name_the_cards_the_recipe_knows() -> None:
    from measured_rows import CARDS
    from peft_recipes.recipe import GPUS

    assert set(CARDS) == set(GPUS)
