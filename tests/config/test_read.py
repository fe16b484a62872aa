"""Every fault of a run file is found at once, with its line and the way out."""
# ruff: noqa: E501 - a table reads best with one case a line

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

BAD = {
    "empty file": ("", "is empty"),
    "only a comment": ("# nothing\n", "is empty"),
    "a list": ("- model\n", "mapping of sections"),
    "a plain word": ("hello\n", "mapping of sections"),
    "broken YAML": ("model: [\n", r"run.yaml:\d+: not valid YAML"),
    "a tab": ("model:\n\tsource: m\n", "run.yaml:2: not valid YAML"),
    "a Python object": ("model: !!python/object:os.system {}\n", "not valid YAML"),
    "setting written twice": (SMALLEST + "  train: e.jsonl\n", "line 5: data.train stands on line"),
    "section written twice": (SMALLEST + "model:\n  source: n\n", "line 5: model stands on line 1"),
    "model missing": ("data:\n  train: d.jsonl\n", "model: has to be given"),
    "data missing": ("model:\n  source: m\n", "data: has to be given"),
    "source missing": ("model: {}\ndata:\n  train: d\n", "model.source: has to be given"),
    "unknown section": (SMALLEST + "trian:\n  epochs: 1\n", "run.yaml:5: trian: unknown setting; did you mean train"),
    "unknown setting": (SMALLEST + "train:\n  epoch: 1\n", "run.yaml:6: train.epoch: unknown setting; did you mean epochs"),
    "wrong section": (SMALLEST + "train:\n  max_seq_len: 9\n", "it belongs at data.max_seq_len"),
    "text for a number": (SMALLEST + "train:\n  epochs: many\n", "train.epochs = 'many': should be a valid integer"),
    "quoted number": (SMALLEST + 'adapter:\n  rank: "8"\n', "adapter.rank = '8': should be a valid integer"),
    "number for text": ("model:\n  source: 5\ndata:\n  train: d\n", "model.source = 5: should be a valid string"),
    "boolean for a number": (SMALLEST + "adapter:\n  rank: true\n", "adapter.rank = True"),
    "fraction for a whole number": (SMALLEST + "adapter:\n  rank: 1.5\n", "adapter.rank = 1.5: should be a valid integer"),
    "rank of zero": (SMALLEST + "adapter:\n  rank: 0\n", "adapter.rank = 0: should be greater than or equal to 1"),
    "negative learning rate": (SMALLEST + "train:\n  learning_rate: -1e-4\n", "greater than 0"),
    "learning rate not a number": (SMALLEST + "train:\n  learning_rate: .nan\n", "train.learning_rate"),
    "dropout of one": (SMALLEST + "adapter:\n  dropout: 1.0\n", "adapter.dropout = 1.0: should be less than 1"),
    "unknown optimizer": (SMALLEST + "train:\n  optimizer: sgd\n", "should be 'paged_adamw_32bit'"),
    "unknown quantization": ("model:\n  source: m\n  quantization: int3\ndata:\n  train: d\n", "should be 'nf4' or 'none'"),
    "unknown device": ("model:\n  source: m\n  device: tpu\ndata:\n  train: d\n", "model.device = 'tpu'"),
    "unknown task": (SMALLEST + "task: dreaming\n", "task = 'dreaming'"),
    "two choices of layers": (SMALLEST + "adapter:\n  layers: {last: 2, first: 2}\n", "exactly one of last, first, range"),
    "no layers": (SMALLEST + "adapter:\n  layers: {last: 0}\n", "adapter.layers.last = 0: should be greater"),
    "layers backwards": (SMALLEST + "adapter:\n  layers: {range: [5, 2]}\n", "start < stop"),
    "no sources": ("model:\n  source: m\ndata:\n  train: []\n", "data.train"),
    "unknown source key": ("model:\n  source: m\ndata:\n  train:\n  - {path: d, wieght: 2}\n", "run.yaml:5: data.train.0.wieght: unknown setting; did you mean weight"),
    "negative weight": ("model:\n  source: m\ndata:\n  train:\n  - {path: d, weight: -1}\n", "data.train.0.weight"),
    "unknown format": ("model:\n  source: m\ndata:\n  train:\n  - {path: d, format: xml}\n", "data.train.0.format = 'xml'"),
    "two kinds of evaluation": (SMALLEST + "  eval: e\n  eval_fraction: 0.1\n", "run.yaml:6: data.eval_fraction = 0.1: data.eval is given too"),
    "patience without evaluation": (SMALLEST + "evaluation:\n  early_stopping_patience: 2\n", "needs held-out rows"),
    "evaluation of nothing": (SMALLEST + "evaluation:\n  every_steps: 2\n", "there are no held-out rows"),
    "warm-up longer than the run": (SMALLEST + "train:\n  max_steps: 5\n  warmup_steps: 9\n", "must be below max_steps = 5"),
    "two kinds of warm-up": (SMALLEST + "train:\n  warmup_ratio: 0.1\n  warmup_steps: 9\n", "keep one of them"),
    "flash attention on a CPU": ("model:\n  source: m\n  device: cpu\n  attention: flash_attention_2\ndata:\n  train: d\n", "needs a GPU"),
    "bf16 adapters on fp16": ("model:\n  source: m\n  compute_dtype: fp16\nadapter:\n  dtype: bf16\ndata:\n  train: d\n", "held in fp32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_bad_run_file_is_told_what_is_wrong(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_run_file(path)


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


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["model", "train", "data", "rank", "x"]), inner, max_size=3),
                    max_leaves=8))  # fmt: skip
def test_nothing_but_our_own_error_comes_out(values: object) -> None:
    with contextlib.suppress(UserError):
        check_values(values if isinstance(values, dict) else {"model": values, "data": values})
