"""Every fault of a run file is found at once, with its line and the way out."""

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.config.document import commented_run_file, json_schema, settings_table
from qlora_trainer.config.read import check_values, read_run_file
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError

SMALLEST = "model:\n  source: m\ndata:\n  train: d.jsonl\n"


def test_all_faults_come_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST + "train:\n  epochs: 0\n  optimiser: adamw\nadapter:\n  rank: 0\n")
    with pytest.raises(UserError) as caught:
        read_run_file(path, ["train.seed=x"])
    message = str(caught.value)
    assert "4 faults" in message
    for part in ("run.yaml:6: train.epochs", "run.yaml:7: train.optimiser", "run.yaml:9", "--set"):
        assert part in message


def test_no_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="qlora init"):
        read_run_file(tmp_path / "none.yaml")


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read_run_file(path)


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train..epochs=1", "task.x=1"])
def test_malformed_override_is_refused(override: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST + "task: causal-lm\n")
    with pytest.raises(UserError, match="--set"):
        read_run_file(path, [override])


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST + "train:\n  learning_rate: 1e-4\n")
    assert read_run_file(path).train.learning_rate == 1e-4
    changed = read_run_file(path, ["train.learning_rate=3e-5", "adapter.layers={last: 8}"])
    assert changed.train.learning_rate == 3e-5
    assert changed.adapter.layers.last == 8  # type: ignore[union-attr]


@pytest.mark.parametrize("more", ["", "  packing: true\n", "train: {warmup_steps: 3}\n"])
def test_resolved_settings_read_back_to_the_same_run(more: str) -> None:
    config = check_values(yaml.safe_load(SMALLEST + more))
    assert check_values(yaml.safe_load(yaml.safe_dump(config.model_dump()))) == config


def test_written_run_file_is_valid_and_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(commented_run_file())
    written = read_run_file(path)
    plain = check_values(
        {"model": {"source": "path/to/model"}, "data": {"train": "path/to/train.jsonl"}}
    )
    assert written == plain


def test_every_commented_default_is_what_the_program_takes(tmp_path: Path) -> None:
    lines = [line.removeprefix("# ") for line in commented_run_file().splitlines()[1:]]
    text = "\n".join("  " + line[4:] if line.startswith("#   ") else line for line in lines)
    uncommented = yaml.safe_load(text)
    assert check_values(uncommented) == RunConfig.model_validate(uncommented)


def test_schema_and_table_know_every_setting() -> None:
    schema = json.loads(json_schema())
    names = {name for name, _, _ in settings_table()}
    assert "train.learning_rate" in names
    assert all(help_line for _, _, help_line in settings_table())
    assert set(schema["required"]) == {"model", "data"}


names = st.sampled_from(["model", "train", "data", "rank", "x"])
plain = st.none() | st.booleans() | st.floats() | st.text(max_size=5)


def nested(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Lists and mappings of what is inside."""
    return st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3)


@given(st.recursive(plain, nested, max_leaves=8))
def test_nothing_but_our_own_error_comes_out(values: object) -> None:
    with contextlib.suppress(UserError):
        check_values(values if isinstance(values, dict) else {"model": values, "data": values})
