"""Forty kinds of bad run files, each with the message it gets."""
# ruff: noqa: E501 - a table reads best with one case a line

from pathlib import Path

import pytest

from qlora_trainer.config.read import read_run_file
from qlora_trainer.errors import UserError
from tests.config.test_read import SMALLEST

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
