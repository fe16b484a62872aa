"""Every fault of a run file is found at once, with its line and the way out."""

import contextlib
import json
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.config.document import commented_run_file, json_schema, settings_table
from qlora_trainer.config.read import check_values, read_run_file
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.config.tasks import TaskName
from qlora_trainer.data.read import DataSource
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


@pytest.mark.parametrize("task", get_args(TaskName))
def test_a_run_file_is_written_for_every_task(task: TaskName, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(commented_run_file(task=task))
    assert read_run_file(path).task == task


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


@pytest.mark.parametrize("section", ["adapter", "train", "evaluation", "output"])
def test_an_empty_section_means_its_defaults(section: str) -> None:
    assert check_values(yaml.safe_load(SMALLEST + f"{section}:\n")) == check_values(
        yaml.safe_load(SMALLEST)
    )


def test_an_empty_evaluation_set_means_none() -> None:
    assert check_values(yaml.safe_load(SMALLEST + "  eval:\n")).data.eval == []


def test_an_empty_section_can_be_set_into(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST + "adapter:\n")
    assert read_run_file(path, ["adapter.rank=4"]).adapter.rank == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.max_steps=3", "--set: trian: unknown setting; did you mean train"),
        ("train.max_stps=3", "--set: train.max_stps: unknown setting; did you mean max_steps"),
        ("evaluation.max_rows=3", "--set: evaluation.max_rows = 3: needs held-out rows"),
        ("model=null", "--set: model: has to be given"),
        ("data.train=[a", "--set data.train=[a: not valid YAML: expected ',' or ']', but got"),
        ("adapter.layers={last: 8, last: 9}", "a setting is written twice"),
        ("data.train=\0", "not valid YAML: special characters are not allowed"),
    ],
)
def test_an_override_is_blamed_in_one_line(override: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST + "train:\n  epochs: 2\n")
    with pytest.raises(UserError) as caught:
        read_run_file(path, [override])
    title, fault = str(caught.value).split("\n")
    assert "1 fault" in title
    assert message in fault
    assert str(path) not in fault


def faults_of(text: str, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_values(yaml.safe_load(text), overrides=overrides or [])
    return sorted(line.removeprefix("  - ") for line in str(caught.value).split("\n")[1:])


def test_contradictions_are_told_beside_faulty_settings() -> None:
    text = SMALLEST + "train: {warmup_steps: 9, max_steps: 5, seed: x}\nevaluation: {max_rows: 2}"
    found = faults_of(text, ["nothing", "model.device=cpu", "model.attention=flash_attention_2"])
    assert [fault[:32] for fault in found] == [
        "--set nothing: write section.set",
        "--set: model.attention = 'flash_",
        "run: evaluation.max_rows = 2: ne",
        "run: train.seed = 'x': should be",
        "run: train.warmup_steps = 9: mus",
    ]


def test_contradictions_are_told_where_sections_are_missing() -> None:
    assert faults_of("evaluation: {every_steps: 2}\ndata: {eval_fraction: 0}") == [
        "run: data.train: has to be given",
        "run: evaluation.every_steps = 2: needs held-out rows; set data.eval or data.eval_fraction",
        "run: model: has to be given",
    ]


@pytest.mark.parametrize(
    "data", ["eval: 3", "eval_fraction: 2.0", "eval_fractoin: 0.1", "eval: {}"]
)
def test_a_faulty_setting_makes_no_contradictions(data: str) -> None:
    found = faults_of(SMALLEST + f"  {data}\nevaluation: {{every_steps: 2}}")
    assert len(found) == 1, found
    assert "data.eval" in found[0]


@pytest.mark.parametrize("given", ["{}", "{last: 2}", "[0, 3]", "all"])
def test_layers_and_targets_read_back(given: str) -> None:
    layers = "" if given == "{}" else f", layers: {given}"
    text = SMALLEST + f"adapter: {{target_modules: [q_proj]{layers}, rank_pattern: {{q_proj: 4}}}}"
    config = check_values(yaml.safe_load(text))
    assert check_values(config.model_dump()) == config


def test_a_data_set_can_be_pinned() -> None:
    config = check_values(
        yaml.safe_load("model: {source: m}\ndata: {train: {path: d, revision: abc}}")
    )
    assert DataSource(**config.data.train[0].model_dump()).revision == "abc"


def test_state_is_saved_often_enough_by_default() -> None:
    output = check_values(yaml.safe_load(SMALLEST)).output
    assert (output.save_every_minutes, output.save_every_steps) == (10.0, None)


KNOWN = sorted({part for name, _, _ in settings_table() for part in name.split(".")})
names = st.sampled_from([*KNOWN, "path", "last", "first", "range", "x", ""])
plain = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates()
    | st.sampled_from(["auto", "all", "all-linear", "none", "nf4", "cuda:0", "(", "bf16", "cosine"])
)  # fmt: skip


def nested(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Lists and mappings of what is inside."""
    keys = names | st.integers(0, 3) | st.booleans() | st.none()
    return st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)


junk = st.recursive(plain, nested, max_leaves=8)


@given(junk)
def test_nothing_but_our_own_error_comes_out(values: object) -> None:
    with contextlib.suppress(UserError):
        check_values(values if isinstance(values, dict) else {"model": values, "data": values})


@given(st.sampled_from([name for name, _, _ in settings_table()]), junk)
def test_junk_in_any_setting_is_our_own_error_and_one_line_each(name: str, value: object) -> None:
    section, _, setting = name.partition(".")
    values: dict[str, object] = {"model": {"source": "m"}, "data": {"train": "d"}}
    values |= {section: {**values.get(section, {}), setting: value} if setting else value}  # type: ignore[dict-item]
    message = None
    try:
        config = check_values(values)
    except UserError as error:
        message = str(error)
    if message is None:
        assert check_values(config.model_dump()) == config
        return
    assert name in message
    assert all(line.startswith("  - run: ") for line in message.split("\n")[1:])
    for words in ("instance of", "dictionary", "tagged-union"):
        assert words not in message
