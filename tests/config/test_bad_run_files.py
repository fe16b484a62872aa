"""Eighty kinds of bad run files, each with the message it gets."""
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
    "an order for rows in no order": (SMALLEST + "  group_by_length: false\n  mega_batch_mult: 9\n", "run.yaml:6: data.mega_batch_mult = 9: is a choice of data.group_by_length, but data.group_by_length = false"),
    "an order for packed rows": (SMALLEST + "  packing: true\n  mega_batch_mult: 9\n", "but data.packing = true; leave it out"),
    "two kinds of evaluation": (SMALLEST + "  eval: e\n  eval_fraction: 0.1\n", "run.yaml:6: data.eval_fraction = 0.1: data.eval is given too"),
    "patience without evaluation": (SMALLEST + "evaluation:\n  early_stopping_patience: 2\n", "needs held-out rows"),
    "evaluation of nothing": (SMALLEST + "evaluation:\n  every_steps: 2\n", "evaluation.every_steps = 2: needs held-out rows"),
    "warm-up longer than the run": (SMALLEST + "train:\n  max_steps: 5\n  warmup_steps: 9\n", "run.yaml:7: train.warmup_steps = 9: must be below train.max_steps = 5"),
    "a choice of the fused MLP without it": (SMALLEST + "train: {mlp_keeps_inner: true}\n", "set train.fused_mlp: true"),
    "tiles of the fused MLP without it": (SMALLEST + "train: {mlp_tile_tokens: 256}\n", "train.mlp_tile_tokens = 256: is a choice of the fused MLP"),
    "chunks of a loss that makes none": (SMALLEST + "train: {loss_chunk_tokens: 64, chunked_loss: false}\n", "set train.chunked_loss: true"),
    "two kinds of warm-up": (SMALLEST + "train:\n  warmup_ratio: 0.1\n  warmup_steps: 9\n", "keep one of them"),
    "flash attention on a CPU": ("model:\n  source: m\n  device: cpu\n  attention: flash_attention_2\ndata:\n  train: d\n", "needs a GPU"),
    "bf16 adapters on fp16": ("model:\n  source: m\n  compute_dtype: fp16\nadapter:\n  dtype: bf16\ndata:\n  train: d\n", "held in fp32"),
    "infinite alpha": (SMALLEST + "adapter:\n  alpha: .inf\n", "adapter.alpha = inf: should be a finite number"),
    "infinite epsilon": (SMALLEST + "train:\n  epsilon: .inf\n", "train.epsilon = inf: should be a finite number"),
    "no targets": (SMALLEST + "adapter:\n  target_modules: []\n", r"adapter.target_modules = \[\]: must not be empty"),
    "empty target": (SMALLEST + "adapter:\n  target_modules: ''\n", "adapter.target_modules = '': must not be empty"),
    "empty target in a list": (SMALLEST + "adapter:\n  target_modules: [q_proj, '']\n", "adapter.target_modules.1 = '': must not be empty"),
    "target named twice": (SMALLEST + "adapter:\n  target_modules: [q_proj, q_proj]\n", "names 'q_proj' more than once"),
    "broken expression of targets": (SMALLEST + "adapter:\n  target_modules: '(q_proj'\n", r"adapter.target_modules = '\(q_proj': is not a regular expression: missing \)"),
    "expression that Python will read otherwise": (SMALLEST + "adapter:\n  target_modules: '[[a]]'\n", "is not a regular expression: Possible nested set"),
    "all linear layers misspelt": (SMALLEST + "adapter:\n  target_modules: all_linear\n", "adapter.target_modules = 'all_linear': did you mean all-linear"),
    "number of targets": (SMALLEST + "adapter:\n  target_modules: 3\n", "adapter.target_modules = 3: should be all-linear, a list of names, or one"),
    "negative rank in a pattern": (SMALLEST + "adapter:\n  rank_pattern: {q_proj: -1}\n", "adapter.rank_pattern.q_proj = -1: should be greater than or equal to 1"),
    "alpha of zero in a pattern": (SMALLEST + "adapter:\n  alpha_pattern: {q_proj: 0}\n", "adapter.alpha_pattern.q_proj = 0: should be greater than 0"),
    "infinite alpha in a pattern": (SMALLEST + "adapter:\n  alpha_pattern: {q_proj: .inf}\n", "adapter.alpha_pattern.q_proj = inf"),
    "broken expression in a pattern": (SMALLEST + "adapter:\n  rank_pattern: {'*q': 4}\n", r"adapter.rank_pattern.\*q = '\*q': is not a regular expression"),
    "flags in a pattern": (SMALLEST + "adapter:\n  rank_pattern: {'(?i)q': 4}\n", "is not a regular expression: global flags"),
    "patterns as a list": (SMALLEST + "adapter:\n  rank_pattern: [4]\n", r"adapter.rank_pattern = \[4\]: should be a mapping"),
    "list of no layers": (SMALLEST + "adapter:\n  layers: []\n", r"adapter.layers = \[\]: must not be empty"),
    "negative layer": (SMALLEST + "adapter:\n  layers: [0, -1]\n", "adapter.layers.1 = -1: should be greater than or equal to 0"),
    "layer named twice": (SMALLEST + "adapter:\n  layers: [1, 1]\n", "adapter.layers = .*: names 1 more than once"),
    "layers in words": (SMALLEST + "adapter:\n  layers: upper\n", r"adapter.layers = 'upper': should be all, a list of layer numbers, \{last: 8\}"),
    "number of layers": (SMALLEST + "adapter:\n  layers: 8\n", "adapter.layers = 8: should be all, a list of layer numbers"),
    "typo in layers": (SMALLEST + "adapter:\n  layers: {lst: 8}\n", r"run.yaml:6: adapter.layers.lst: unknown setting; did you mean last\?"),
    "range of three": (SMALLEST + "adapter:\n  layers: {range: [1, 2, 3]}\n", r"adapter.layers.range = \[1, 2, 3\]: should have 2 items"),
    "empty module to save": (SMALLEST + "adapter:\n  modules_to_save: ['']\n", "adapter.modules_to_save.0 = '': must not be empty"),
    "empty unquantized module": ("model:\n  source: m\n  keep_unquantized: [' ']\ndata:\n  train: d\n", "model.keep_unquantized.0 = ' ': must not be empty"),
    "tracker named twice": (SMALLEST + "output:\n  trackers: [wandb, wandb]\n", "names 'wandb' more than once"),
    "tracker without a list": (SMALLEST + "output:\n  trackers: wandb\n", r"output.trackers = 'wandb': should be a list, such as \[wandb\]"),
    "empty revision": ("model:\n  source: m\n  revision: ''\ndata:\n  train: d\n", "model.revision = '': must not be empty"),
    "commit of digits only": ("model:\n  source: m\n  revision: 1234567\ndata:\n  train: d\n", "model.revision = 1234567: should be a valid string; put it in quotes"),
    "empty model section": ("model:\ndata:\n  train: d\n", "run.yaml:1: model: has to be given"),
    "empty data section": ("model:\n  source: m\ndata:\n", "run.yaml:3: data: has to be given"),
    "empty source": ("model:\n  source:\ndata:\n  train: d\n", "run.yaml:2: model.source: has to be given"),
    "empty training data": ("model:\n  source: m\ndata:\n  train:\n", "run.yaml:4: data.train: has to be given"),
    "setting without a value": (SMALLEST + "train:\n  epochs:\n", "train.epochs: has no value; should be a valid integer; leave it out"),
    "section with a word": (SMALLEST + "train: fast\n", "run.yaml:5: train = 'fast': should hold settings, one a line below it"),
    "model as a word": ("model: m\ndata:\n  train: d\n", "model = 'm': should hold settings"),
    "number among sources": ("model:\n  source: m\ndata:\n  train: [d, 3]\n", "data.train.1 = 3: should be a path or a mapping with path"),
    "device of another name": ("model:\n  source: m\n  device: gpu\ndata:\n  train: d\n", "model.device = 'gpu': should be auto, cpu, cuda or, .* cuda:1$"),
    "word for yes": (SMALLEST + '  packing: "yes"\n', "data.packing = 'yes': should be true or false"),
    "line break in a name": (SMALLEST + 'train: {"a\\nb": 1}\n', r"train.'a\\nb': unknown setting$"),
    "number for a section's name": (SMALLEST + "train: {1: 2}\n", "train.1"),
    "typo of another section's setting": (SMALLEST + "train: {max_seq_length: 512}\n", r"train.max_seq_length: unknown setting; did you mean data.max_seq_len\?"),
    "saving every no minutes": (SMALLEST + "output: {save_every_minutes: 0}\n", "output.save_every_minutes = 0: should be greater than 0"),
    "rows of no evaluation": (SMALLEST + "evaluation:\n  max_rows: 5\n", "run.yaml:6: evaluation.max_rows = 5: needs held-out rows"),
    "batch of no evaluation": (SMALLEST + "evaluation:\n  micro_batch_size: 5\n", "evaluation.micro_batch_size = 5: needs held-out rows"),
    "double quantization of nothing": ("model:\n  source: m\n  quantization: none\n  double_quant: false\ndata:\n  train: d\n", "run.yaml:4: model.double_quant = False: means nothing with model.quantization = 'none'"),
    "block size of nothing": ("model:\n  source: m\n  quantization: none\n  block_size: 128\ndata:\n  train: d\n", "model.block_size = 128: means nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_bad_run_file_is_told_what_is_wrong(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_run_file(path)
    for words in ("instance of", "dictionary", "pattern '", "tagged-union"):
        assert words not in str(caught.value)


def test_aliases_that_repeat_themselves_into_billions_are_refused_at_once(tmp_path: Path) -> None:
    bomb = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    bomb += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(bomb))
    with pytest.raises(UserError, match=r"more than 10000 entries, counting what aliases"):
        read_run_file(file)
